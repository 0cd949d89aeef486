//! Tables for terminals: columns as wide as their widest cell, two spaces between, nothing at the ends of lines.

use std::fmt;

/// Rows below a heading.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Without rows.
    pub(crate) fn new(heading: &[&'static str]) -> Self {
        Self { heading: heading.to_vec(), rows: Vec::new() }
    }

    /// One more row. An empty cell is shown as `-`, so that columns can be counted by programs such as awk.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells =
            cells.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { one_line(&cell) });
        self.rows.push(cells.collect());
    }

    /// Whether there is nothing below the heading.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// In the order of their cells, from the left.
    pub(crate) fn sort(&mut self) {
        self.rows.sort();
    }
}

/// What others wrote (messages of pods, names from files) must not move the cursor or begin a line of its own.
pub(crate) fn one_line(text: &str) -> String {
    text.trim_end().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|c| c.chars().count()).chain([self.heading[column].len()]).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..self.heading.len()).map(width).collect();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let padded: Vec<String> = cells.zip(&widths).map(|(cell, w)| format!("{cell:w$}")).collect();
            writeln!(f, "{}", padded.join("  ").trim_end())
        };
        line(&mut self.heading.iter().copied())?;
        self.rows.iter().try_for_each(|row| line(&mut row.iter().map(String::as_str)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_with_text() {
        let mut table = Table::new(&["NODE", "READY", "PROBLEMS"]);
        table.row(["node1".to_owned(), "yes".to_owned(), String::new()]);
        table.row(["a-node-with-a-name".to_owned(), "no".to_owned(), "no worker".to_owned()]);
        assert_eq!(
            table.to_string(),
            "NODE                READY  PROBLEMS\n\
             node1               yes    -\n\
             a-node-with-a-name  no     no worker\n"
        );
    }

    #[test]
    fn a_cell_cannot_begin_a_line_or_move_the_cursor() {
        let mut table = Table::new(&["MESSAGE"]);
        table.row(["all\nis \x1b[2Jwell\n".to_owned()]);
        assert_eq!(table.to_string(), "MESSAGE\nall is  [2Jwell\n");
    }

    #[test]
    fn rows_are_sorted_by_their_cells_from_the_left() {
        let mut table = Table::new(&["A", "B"]);
        assert!(table.is_empty());
        for (a, b) in [("2", "1"), ("1", "2"), ("1", "1")] {
            table.row([a.to_owned(), b.to_owned()]);
        }
        table.sort();
        assert_eq!(table.to_string(), "A  B\n1  1\n1  2\n2  1\n");
    }
}

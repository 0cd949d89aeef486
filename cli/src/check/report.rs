//! Findings, and how they are shown.

use std::fmt;

use serde::Serialize;

use crate::access::Unread;
use crate::table::one_line;

/// Objects that are named below a finding; JSON has all of them.
const NAMED: usize = 10;

/// What a finding means for whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Works, and somebody should know.
    Warning,
    /// Does not work, or not as whoever wrote it believes.
    Error,
}

/// What a finding is about; also the order in which they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Group {
    Cluster,
    Nodes,
    Installation,
    Controller,
    Certificates,
    Agents,
    Tunnels,
    Pods,
    Configuration,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "Cluster",
            Self::Nodes => "Nodes",
            Self::Installation => "Installation",
            Self::Controller => "Controller",
            Self::Certificates => "Certificate authority",
            Self::Agents => "Node agents",
            Self::Tunnels => "Tunnels between nodes",
            Self::Pods => "Pods",
            Self::Configuration => "Labels and annotations",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) group: Group,
    /// Name of the check, for programs; stays the same when the message is worded anew.
    pub(crate) check: &'static str,
    pub(crate) level: Level,
    pub(crate) message: String,
    /// What to do; none when there is nothing to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
    /// Which objects it concerns.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) objects: Vec<String>,
}

impl Finding {
    /// All is well.
    pub(crate) fn ok(group: Group, check: &'static str, message: impl Into<String>) -> Self {
        Self { group, check, level: Level::Ok, message: message.into(), hint: None, objects: Vec::new() }
    }

    /// Something to know.
    pub(crate) fn warning(
        group: Group,
        check: &'static str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { level: Level::Warning, hint: Some(hint.into()), ..Self::ok(group, check, message) }
    }

    /// Something to repair.
    pub(crate) fn error(
        group: Group,
        check: &'static str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { level: Level::Error, hint: Some(hint.into()), ..Self::ok(group, check, message) }
    }

    /// What could not be looked at counts as not well.
    pub(crate) fn unread(group: Group, check: &'static str, unread: &Unread) -> Self {
        Self::error(group, check, &unread.message, &unread.hint)
    }

    /// With the objects that it concerns.
    pub(crate) fn about(mut self, objects: Vec<String>) -> Self {
        self.objects = objects;
        self
    }
}

/// All findings.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// There is no error.
    pub(crate) ok: bool,
    pub(crate) errors: usize,
    pub(crate) warnings: usize,
    pub(crate) findings: Vec<Finding>,
}

impl Report {
    /// Sorted into their groups.
    pub(crate) fn new(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|f| f.group);
        let count = |level| findings.iter().filter(|f| f.level == level).count();
        let (errors, warnings) = (count(Level::Error), count(Level::Warning));
        Self { ok: errors == 0, errors, warnings, findings }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut group = None;
        for finding in &self.findings {
            if group != Some(finding.group) {
                let gap = if group.is_some() { "\n" } else { "" };
                writeln!(f, "{gap}{}", finding.group)?;
                group = Some(finding.group);
            }
            let mark = match finding.level {
                Level::Ok => "ok     ",
                Level::Warning => "warning",
                Level::Error => "ERROR  ",
            };
            writeln!(f, "  {mark}  {}", one_line(&finding.message))?;
            for object in finding.objects.iter().take(NAMED) {
                writeln!(f, "           - {}", one_line(object))?;
            }
            if let Some(more) = finding.objects.len().checked_sub(NAMED).filter(|more| *more > 0) {
                writeln!(f, "           and {more} more; -o json has all of them")?;
            }
            if let Some(hint) = &finding.hint {
                writeln!(f, "           hint: {}", one_line(hint))?;
            }
        }
        match (self.errors, self.warnings) {
            (0, 0) => writeln!(f, "\nAll is well."),
            (errors, warnings) => {
                let count = |n: usize, what| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
                writeln!(f, "\n{}, {}.", count(errors, "error"), count(warnings, "warning"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_shown_by_group_with_their_objects_and_a_hint() {
        let uncovered = (1..=12).map(|n| format!("shop/web-{n}")).collect();
        let report = Report::new(vec![
            Finding::error(Group::Pods, "uncaptured", "12 pods are not captured", "restart them")
                .about(uncovered),
            Finding::ok(Group::Cluster, "version", "the API server answers"),
            Finding::warning(Group::Pods, "odd", "something\nis odd", "look"),
        ]);
        let text = report.to_string();
        assert!(
            text.starts_with(
                "Cluster\n  ok       the API server answers\n\nPods\n  ERROR    12 pods are not"
            ),
            "{text}"
        );
        assert!(text.contains("           - shop/web-10\n           and 2 more; -o json has all of them\n           hint: restart them\n"), "{text}");
        assert!(text.contains("  warning  something is odd\n"), "{text}");
        assert!(text.ends_with("\n1 error, 1 warning.\n"), "{text}");
        assert!(!report.ok);
    }

    #[test]
    fn programs_get_a_level_a_group_and_all_objects() {
        let report = Report::new(vec![
            Finding::warning(Group::Configuration, "unknown-label", "x", "y").about(vec!["a".into()]),
        ]);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["ok"], true);
        assert_eq!(json["findings"][0]["level"], "warning");
        assert_eq!(json["findings"][0]["group"], "configuration");
        assert_eq!(json["findings"][0]["objects"][0], "a");
    }
}

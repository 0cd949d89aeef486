//! Points in time, for people.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Seconds of a day.
const DAY: i64 = 86_400;

/// As the API server and the mesh's endpoints write it.
pub(crate) fn parse(text: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok()
}

/// `2036-11-18 09:00 UTC (in 9 years)`.
pub(crate) fn with_distance(at: OffsetDateTime, now: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC);
    let (date, hour, minute) = (at.date(), at.hour(), at.minute());
    format!("{date} {hour:02}:{minute:02} UTC ({})", distance(at, now))
}

/// `in 3 hours`, `2 days ago`.
pub(crate) fn distance(at: OffsetDateTime, now: OffsetDateTime) -> String {
    let seconds = (at - now).whole_seconds();
    let (amount, unit) = match seconds.abs() {
        s if s >= 2 * 365 * DAY => (s / (365 * DAY), "years"),
        s if s >= 2 * DAY => (s / DAY, "days"),
        s if s >= 7_200 => (s / 3_600, "hours"),
        s if s >= 120 => (s / 60, "minutes"),
        s => (s, "seconds"),
    };
    if seconds < 0 { format!("{amount} {unit} ago") } else { format!("in {amount} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_told_with_its_distance_in_a_fitting_unit() {
        let now = parse("2026-11-21T16:00:00Z").unwrap();
        let told = |text: &str| with_distance(parse(text).unwrap(), now);
        assert_eq!(told("2036-11-18T09:05:00Z"), "2036-11-18 09:05 UTC (in 9 years)");
        assert_eq!(told("2026-11-22T15:00:00+01:00"), "2026-11-22 14:00 UTC (in 22 hours)");
        assert_eq!(told("2026-11-21T15:59:00Z"), "2026-11-21 15:59 UTC (60 seconds ago)");
        assert_eq!(told("2026-11-11T16:00:00Z"), "2026-11-11 16:00 UTC (10 days ago)");
        assert_eq!(parse("yesterday"), None);
    }
}

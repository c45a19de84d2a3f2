//! Rows of the table: the result of each check, and the table as text. Pure.

use std::borrow::Cow;
use std::fmt::Write;

use dyad_proto::ErrorCode;

/// Result of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoctorRow {
    /// Name of the check.
    pub check: &'static str,
    /// Result.
    pub state: CheckState,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    pub hint: Cow<'static, str>,
}

/// State of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckState {
    /// Good.
    Ok,
    /// A run would start, but something is unusual.
    Warn,
    /// A run would not get far.
    Fail,
    /// A machine or port is not reached.
    Unreachable,
}

impl DoctorRow {
    /// A row without a hint.
    #[must_use]
    pub fn ok(check: &'static str, detail: String) -> Self {
        Self { check, state: CheckState::Ok, detail, hint: "".into() }
    }
}

/// The table as text, and the error code of the worst row; `None` if no row fails.
#[must_use]
pub fn table(rows: &[DoctorRow]) -> (String, Option<ErrorCode>) {
    let width = rows.iter().map(|row| row.check.len()).max().unwrap_or(0);
    let mut out = String::new();
    for row in rows {
        let state = match row.state {
            CheckState::Ok => "ok",
            CheckState::Warn => "warn",
            CheckState::Fail | CheckState::Unreachable => "FAIL",
        };
        let _ = writeln!(out, "{:width$}  {state:4}  {}", row.check, row.detail);
        if !row.hint.is_empty() {
            let _ = writeln!(out, "{:width$}        hint: {}", "", row.hint);
        }
    }
    let any = |state: CheckState| rows.iter().any(|row| row.state == state);
    let code = match (any(CheckState::Unreachable), any(CheckState::Fail)) {
        (true, _) => Some(ErrorCode::Unavailable),
        (false, true) => Some(ErrorCode::InvalidInput),
        (false, false) => None,
    };
    (out, code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreachable_outranks_failed() {
        let unreachable =
            DoctorRow { check: "ssh", state: CheckState::Unreachable, detail: "b".into(), hint: "x".into() };
        let failed =
            DoctorRow { check: "disk", state: CheckState::Fail, detail: String::new(), hint: "y".into() };
        assert_eq!(table(&[failed, unreachable]).1, Some(ErrorCode::Unavailable));
        assert_eq!(table(&[]).1, None);
    }
}

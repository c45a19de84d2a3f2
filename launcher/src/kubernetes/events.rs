//! Parses the coordinator's log in a pod: JSON lines are events of the run, other lines are plain log lines.

use dyad_proto::wire::RunEvent;
use dyad_proto::wire::run_event::Body;
use serde_json::Value;

/// The event in a line; `None` for other lines.
#[must_use]
pub fn event(line: &str) -> Option<Body> {
    if !line.starts_with("{\"body\":") {
        return None;
    }
    let mut value: Value = serde_json::from_str(line).ok()?;
    drop_nulls(&mut value);
    serde_json::from_value::<RunEvent>(value).ok()?.body
}

/// JSON has no NaN, so a NaN metric is written as null. Removes such metrics.
fn drop_nulls(event: &mut Value) {
    for kind in ["step", "evaluation"] {
        if let Some(Value::Object(values)) = event.pointer_mut(&format!("/body/{kind}/values")) {
            values.retain(|_, value| !value.is_null());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use dyad_proto::wire::{Failure, RunEnded, StepMetrics};

    use super::*;

    fn line(body: Body) -> String {
        serde_json::to_string(&RunEvent { body: Some(body) }).unwrap()
    }

    #[test]
    fn events_come_back_as_they_were_written() {
        let failure = Failure {
            code: 1,
            message: "bad".into(),
            hint: "mend".into(),
            origin: "coordinator".into(),
            ..Failure::default()
        };
        let ended = Body::Ended(RunEnded { failure: Some(failure) });
        assert_eq!(event(&line(ended.clone())), Some(ended));
        let step = Body::Step(StepMetrics { step: 3, values: HashMap::from([("loss".into(), 0.5)]) });
        assert_eq!(event(&line(step.clone())), Some(step));
    }

    #[test]
    fn a_nan_metric_is_dropped_and_the_others_stay() {
        let values = HashMap::from([("loss".to_owned(), f64::NAN), ("kl".to_owned(), 1.0)]);
        let text = line(Body::Step(StepMetrics { step: 3, values }));
        assert!(text.contains("null"), "{text}");
        let kept = HashMap::from([("kl".to_owned(), 1.0)]);
        assert_eq!(event(&text), Some(Body::Step(StepMetrics { step: 3, values: kept })));
    }

    #[test]
    fn other_lines_are_no_events() {
        for other in [
            "",
            "{\"listening\":\"0.0.0.0:29400\"}",
            "2026-11-24 INFO ready",
            "{\"body\":",
            "{\"body\":{\"x\":1}}",
        ] {
            assert_eq!(event(other), None, "{other}");
        }
    }
}

//! Rendered objects: built from typed structs, then kept as JSON values.

use dyad_proto::Fault;
use serde::Serialize;
use serde_json::{Map, Value};

/// One object, with its fields in a readable order.
#[derive(Clone, Debug, PartialEq)]
pub struct Object(pub Value);

impl Object {
    /// Kind of the object.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.0["kind"].as_str().unwrap_or_default()
    }

    /// Group and version.
    #[must_use]
    pub fn api_version(&self) -> &str {
        self.0["apiVersion"].as_str().unwrap_or_default()
    }

    /// Name of the object.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0["metadata"]["name"].as_str().unwrap_or_default()
    }

    /// File name: the kind, such as `jobset.yaml`, plus the part of its name after the run's, such as `service-coordinator.yaml`.
    #[must_use]
    pub fn file_name(&self, run: &str) -> String {
        let kind = self.kind().to_lowercase();
        match self.name().strip_prefix(run).unwrap_or(self.name()).trim_start_matches('-') {
            "" => format!("{kind}.yaml"),
            rest => format!("{kind}-{rest}.yaml"),
        }
    }
}

/// Converts a typed object.
pub fn object<T: Serialize>(typed: &T) -> Result<Object, Fault> {
    serde_json::to_value(typed)
        .map(|value| Object(ordered(value)))
        .map_err(|error| Fault::failed(format!("cannot render an object: {error}")))
}

/// Fields that are written first; all others follow in alphabetical order.
const FIRST: [&str; 14] = [
    "apiVersion",
    "kind",
    "name",
    "metadata",
    "namespace",
    "image",
    "command",
    "args",
    "action",
    "env",
    "replicas",
    "parallelism",
    "completions",
    "mountPath",
];

fn ordered(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<(String, Value)> =
                fields.into_iter().map(|(key, value)| (key, ordered(value))).collect();
            let place = |key: &str| FIRST.iter().position(|first| *first == key).unwrap_or(FIRST.len());
            fields.sort_by(|(a, _), (b, _)| place(a).cmp(&place(b)).then_with(|| a.cmp(b)));
            Value::Object(fields.into_iter().collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(ordered).collect()),
        plain => plain,
    }
}

/// YAML of one object.
pub fn yaml(value: &Value) -> Result<String, Fault> {
    let text = serde_saphyr::to_string(value)
        .map_err(|error| Fault::failed(format!("cannot write YAML: {error}")))?;
    Ok(format!("{}\n", text.trim_end()))
}

/// All objects as one YAML stream.
pub fn stream(objects: &[Object]) -> Result<String, Fault> {
    let parts = objects.iter().map(|object| yaml(&object.0)).collect::<Result<Vec<_>, _>>()?;
    Ok(parts.join("---\n"))
}

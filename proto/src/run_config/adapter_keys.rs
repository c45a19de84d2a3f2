//! Keys of adapters that have PEFT's names and meaning. The trainer reads them with the code that reads `adapter_config.json`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{LoraModules, RunConfig};
use crate::Fault;

/// Names of modules: a list, or one text with commas between names or with a regular expression.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of names, or one text")]
pub enum ModuleNames {
    /// `["q_proj", "v_proj"]`.
    List(Vec<String>),
    /// `"q_proj,v_proj"`, or a regular expression.
    Text(String),
}

/// PEFT's `init_lora_weights`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or a name in quotes")]
pub enum InitLoraWeights {
    /// True: A uniform and B zero. False: both uniform.
    Usual(bool),
    /// A named way, such as `gaussian`.
    Named(String),
}

/// These keys, with the values that absent keys stand for.
#[must_use]
pub fn adapter_keys() -> Vec<(&'static str, Value)> {
    vec![
        ("exclude_modules", json!([])),
        ("modules_to_save", json!([])),
        ("layers_to_transform", json!([])),
        ("layers_pattern", json!([])),
        ("rank_pattern", json!({})),
        ("alpha_pattern", json!({})),
        ("use_rslora", json!(false)),
        ("use_dora", json!(false)),
        ("lora_bias", json!(false)),
        ("init_lora_weights", json!(true)),
    ]
}

impl RunConfig {
    /// The fields of PEFT's `LoraConfig` that the run's keys set, without the target modules.
    pub fn adapter_fields(&self) -> Result<Map<String, Value>, Fault> {
        let mut fields = Map::new();
        for (key, _) in adapter_keys() {
            let value = match key {
                "exclude_modules" => {
                    self.exclude_modules.as_ref().map(|names| names.field(key)).transpose()?
                }
                "modules_to_save" => self.modules_to_save.as_ref().map(|names| json!(names)),
                "layers_to_transform" => self.layers_to_transform.as_ref().map(|layers| json!(layers)),
                "layers_pattern" => self.layers_pattern.as_ref().map(|names| json!(names)),
                "rank_pattern" => self.rank_pattern.clone().map(Value::Object),
                "alpha_pattern" => self.alpha_pattern.clone().map(Value::Object),
                "use_rslora" => self.use_rslora.map(Value::Bool),
                "use_dora" => self.use_dora.map(Value::Bool),
                "lora_bias" => self.lora_bias.map(Value::Bool),
                "init_lora_weights" => self.init_lora_weights.as_ref().map(|way| json!(way)),
                _ => None,
            };
            fields.extend(value.map(|value| (key.to_owned(), value)));
        }
        Ok(fields)
    }

    /// Fails if a key of adapters is set in a run without adapters.
    pub(super) fn check_adapter_keys(&self) -> Result<(), Fault> {
        self.lora_modules()?;
        match self.adapter_fields()?.keys().next() {
            Some(key) if !self.lora => {
                Err(Fault::input(format!("{key} is set but lora is not")).hint("set lora = true"))
            }
            _ => Ok(()),
        }
    }
}

impl ModuleNames {
    /// The field as PEFT reads it: a list of names, or one regular expression.
    fn field(&self, key: &'static str) -> Result<Value, Fault> {
        let text = match self {
            Self::List(names) => return Ok(json!(names)),
            Self::Text(text) => text,
        };
        match LoraModules::parse(key, text)? {
            LoraModules::Names(names) => Ok(json!(names)),
            LoraModules::Pattern(pattern) => Ok(json!(pattern)),
            LoraModules::AllLinear => {
                Err(Fault::input(format!("config key `{key}`: expected names of modules, found {text:?}"))
                    .hint(format!("for example {key} = [\"down_proj\"]")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(keys: &str) -> Result<String, String> {
        let good = "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\n";
        let config = RunConfig::from_toml(&format!("{good}{keys}"), "run.toml", &[]);
        let fields = config.and_then(|config| config.adapter_fields());
        fields.map(|fields| Value::Object(fields).to_string()).map_err(|fault| fault.to_string())
    }

    #[test]
    fn patterns_keep_the_order_of_the_file() {
        let found = fields("lora = true\n[rank_pattern]\nv_proj = 4\n\"layers.1.q_proj\" = 2\na = 1\n");
        assert_eq!(found.unwrap(), r#"{"rank_pattern":{"v_proj":4,"layers.1.q_proj":2,"a":1}}"#);
        let found = fields("lora = true\nalpha_pattern = { z = 0.5, b = 2 }\n");
        assert_eq!(found.unwrap(), r#"{"alpha_pattern":{"z":0.5,"b":2}}"#);
    }

    #[test]
    fn names_may_be_a_list_or_a_text() {
        for text in ["[\"k_proj\", \"v_proj\"]", "\"k_proj, v_proj\""] {
            let found = fields(&format!("lora = true\nexclude_modules = {text}\n"));
            assert_eq!(found.unwrap(), r#"{"exclude_modules":["k_proj","v_proj"]}"#);
        }
        let found = fields("lora = true\nexclude_modules = \".*k_proj\"\n").unwrap();
        assert_eq!(found, r#"{"exclude_modules":".*k_proj"}"#);
        let found = fields("lora = true\nexclude_modules = \"all-linear\"\n").unwrap_err();
        assert!(found.contains("`exclude_modules`: expected names"), "{found}");
    }

    #[test]
    fn a_key_of_adapters_needs_lora() {
        assert!(fields("use_rslora = true\n").unwrap_err().starts_with("use_rslora is set but lora is not"));
        let found = fields("lora = true\nuse_rslora = 1\n").unwrap_err();
        assert!(found.contains("config key `use_rslora`: invalid type"), "{found}");
        let found = fields("lora = true\nexclude_modules = 3\n").unwrap_err();
        assert!(found.contains("config key `exclude_modules`: expected a list of names"), "{found}");
    }
}

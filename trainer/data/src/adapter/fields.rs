//! The fields of `adapter_config.json`. Fields that choose layers, ranks and scales are read; fields that do not affect the result are
//! ignored; every other field must have its neutral value.

use dyad_proto::Fault;
use serde_json::{Map, Value};

use super::python_regex::PythonRegex;
use super::targets::{Exclude, Layers, Patterns, Targets, unreadable};
use super::{AdapterConfig, Init};

/// PEFT's default of `target_modules` for both supported families.
const USUAL_TARGETS: [&str; 2] = ["q_proj", "v_proj"];
/// PEFT's default rank and alpha.
const USUAL_RANK: i64 = 8;
const USUAL_ALPHA: f64 = 8.0;

/// Fields that [`parse`] reads.
const READ: [&str; 20] = [
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "base_model_name_or_path",
    "revision",
    "bias",
    "init_lora_weights",
    "fan_in_fan_out",
];

/// Ignored fields: notes, and settings of features that another field turns on.
const NOTES: [&str; 7] = [
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    // Settings of the initialisation.
    "eva_config",
];

/// Initialisations that do not change the base model.
const HARMLESS_BEGINNINGS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Parses a configuration; fails at the first field that is not supported.
pub(super) fn parse(fields: &Map<String, Value>) -> Result<AdapterConfig, Fault> {
    parse_with(fields, None)
}

/// The same with other targets than the fields'.
pub(super) fn parse_with(
    fields: &Map<String, Value>,
    targets: Option<Targets>,
) -> Result<AdapterConfig, Fault> {
    refuse_unsupported(fields)?;
    let fields = AdapterFields(fields);
    let targets = targets.map_or_else(|| fields.targets(), Ok)?;
    let mut warnings = Vec::new();
    if fields.flag("fan_in_fan_out")? {
        warnings.push("fan_in_fan_out is ignored: the layers are linear".to_owned());
    }
    let config = AdapterConfig {
        r: fields.integer("r")?.unwrap_or(USUAL_RANK),
        lora_alpha: fields.number("lora_alpha")?.unwrap_or(USUAL_ALPHA),
        lora_dropout: fields.number("lora_dropout")?.unwrap_or(0.0),
        use_rslora: fields.flag("use_rslora")?,
        use_dora: fields.flag("use_dora")?,
        lora_bias: fields.flag("lora_bias")?,
        rank_pattern: fields.patterns("rank_pattern")?,
        alpha_pattern: fields.patterns("alpha_pattern")?,
        exclude: fields.exclude()?,
        modules_to_save: fields.names("modules_to_save")?.unwrap_or_default(),
        layers: fields.layers(&targets)?,
        targets,
        base: fields.text("base_model_name_or_path")?,
        revision: fields.text("revision")?,
        init: fields.init(),
        warnings,
    };
    check_ranks(&config)?;
    refuse_combined(&config)?;
    Ok(config)
}

/// Fails for fields that PEFT refuses together.
fn refuse_combined(config: &AdapterConfig) -> Result<(), Fault> {
    let with = match &config.init {
        _ if !config.lora_bias => return Ok(()),
        _ if config.use_dora => "use_dora".to_owned(),
        Init::Uniform | Init::NotZero => return Ok(()),
        Init::Gaussian => "init_lora_weights = \"gaussian\"".to_owned(),
        Init::Past(way) => format!("init_lora_weights = {way:?}"),
    };
    Err(Fault::input(format!("lora_bias cannot be used with {with}")).hint("PEFT refuses it as well"))
}

fn check_ranks(config: &AdapterConfig) -> Result<(), Fault> {
    if config.r < 1 {
        return Err(Fault::input(format!("r = {}: expected at least 1", config.r)));
    }
    // The same limits as in the run's configuration.
    if let Some(alpha) = config
        .alpha_pattern
        .values()
        .chain([config.lora_alpha])
        .find(|alpha| !(1e-6..=1e6).contains(&alpha.abs()))
    {
        return Err(Fault::input(format!("lora_alpha = {alpha:?}: expected a number from 1e-6 to 1e6")));
    }
    let dropout = config.lora_dropout;
    if !(0.0..1.0).contains(&dropout) || dropout as f32 >= 1.0 {
        return Err(Fault::input(format!("lora_dropout = {dropout:?}: expected at least 0 and below 1")));
    }
    match config.rank_pattern.values().find(|rank| *rank < 1.0 || rank.fract() != 0.0 || *rank > 1e9) {
        Some(rank) => {
            Err(Fault::input(format!("rank_pattern holds {rank}: expected whole numbers of at least 1")))
        }
        None => Ok(()),
    }
}

fn refuse_unsupported(fields: &Map<String, Value>) -> Result<(), Fault> {
    let text = |name: &str| fields.get(name).and_then(Value::as_str);
    match fields.get("peft_type") {
        Some(Value::String(kind)) if kind == "LORA" => {}
        other => {
            return Err(
                unsupported("peft_type", other.unwrap_or(&Value::Null)).hint("only LORA is supported")
            );
        }
    }
    for (name, value) in fields {
        let neutral = match name.as_str() {
            "task_type" => value.is_null() || text("task_type") == Some("CAUSAL_LM"),
            "bias" => value.is_null() || text("bias") == Some("none"),
            "init_lora_weights" => {
                value.is_null()
                    || value.is_boolean()
                    || value.as_str().is_some_and(|way| HARMLESS_BEGINNINGS.contains(&way))
            }
            name => READ.contains(&name) || NOTES.contains(&name) || is_nothing(value),
        };
        if !neutral {
            return Err(unsupported(name, value).hint(remedy(name)));
        }
    }
    Ok(())
}

/// Whether a value is null, false or empty.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn unsupported(name: &str, value: &Value) -> Fault {
    Fault::input(format!("{name} = {} is not supported", shortened(value)))
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn remedy(name: &str) -> &'static str {
    match name {
        "init_lora_weights" => {
            "PEFT changes the base model's weights when it loads such an adapter; convert it with PEFT's \
             save_pretrained(path_initial_model_for_weight_conversion=…), or start from the merged model"
        }
        "task_type" => "an adapter of another kind of model; expected CAUSAL_LM",
        _ => {
            "merge the adapter with PEFT (merge_and_unload, then save_pretrained) and start from the merged model; \
             where the field changes nothing, set it to null"
        }
    }
}

struct AdapterFields<'a>(&'a Map<String, Value>);

impl AdapterFields<'_> {
    /// `None` if the field is absent or null.
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            Fault::input(format!("{name} = {}: expected {expected}", shortened(value)))
                .hint("the file must be as PEFT writes it")
        })
    }

    fn flag(&self, name: &str) -> Result<bool, Fault> {
        Ok(self.typed(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    fn integer(&self, name: &str) -> Result<Option<i64>, Fault> {
        self.typed(name, "a whole number", Value::as_i64)
    }

    fn number(&self, name: &str) -> Result<Option<f64>, Fault> {
        self.typed(name, "a number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    fn text(&self, name: &str) -> Result<Option<String>, Fault> {
        let text = self.typed(name, "a string", |value| value.as_str().map(|text| text.trim().to_owned()))?;
        Ok(text.filter(|text| !text.is_empty()))
    }

    fn patterns(&self, name: &str) -> Result<Patterns, Fault> {
        let object = self.typed(name, "an object", |value| value.as_object().cloned())?.unwrap_or_default();
        Patterns::new(&object).map_err(|fault| named(name, fault))
    }

    fn init(&self) -> Init {
        match self.get("init_lora_weights") {
            None | Some(Value::Bool(true)) => Init::Uniform,
            Some(Value::Bool(false)) => Init::NotZero,
            Some(Value::String(way)) if way == "gaussian" => Init::Gaussian,
            Some(other) => Init::Past(other.as_str().unwrap_or_default().to_owned()),
        }
    }

    fn names(&self, name: &str) -> Result<Option<Vec<String>>, Fault> {
        self.typed(name, "a list of names", |value| {
            let names = value.as_array()?.iter().map(|name| name.as_str().map(str::to_owned));
            names.collect::<Option<Vec<String>>>()
        })
    }

    fn targets(&self) -> Result<Targets, Fault> {
        match self.get("target_modules") {
            None => Ok(Targets::Names(USUAL_TARGETS.map(str::to_owned).into())),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Ok(Targets::AllLinear),
            Some(Value::String(text)) => pattern("target_modules", text).map(Targets::Pattern),
            Some(_) => Ok(Targets::Names(self.names("target_modules")?.unwrap_or_default())),
        }
    }

    fn exclude(&self) -> Result<Exclude, Fault> {
        match self.get("exclude_modules") {
            Some(value) if is_nothing(value) => Ok(Exclude::Nothing),
            None => Ok(Exclude::Nothing),
            Some(Value::String(text)) => pattern("exclude_modules", text).map(Exclude::Pattern),
            Some(_) => Ok(Exclude::Names(self.names("exclude_modules")?.unwrap_or_default())),
        }
    }

    fn layers(&self, targets: &Targets) -> Result<Option<Layers>, Fault> {
        let indices = match self.get("layers_to_transform") {
            Some(Value::Number(_)) => self.integer("layers_to_transform")?.map(|index| vec![index]),
            _ => self.typed("layers_to_transform", "a list of layer numbers", |value| {
                value.as_array()?.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>()
            })?,
        };
        let lists = match self.get("layers_pattern") {
            Some(Value::String(list)) if !list.is_empty() => vec![list.clone()],
            Some(Value::String(_)) | None => Vec::new(),
            Some(_) => self.names("layers_pattern")?.unwrap_or_default(),
        };
        let word =
            |list: &&String| list.is_empty() || !list.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if let Some(list) = lists.iter().find(word) {
            return Err(
                Fault::input(format!("layers_pattern {list:?} is not supported")).hint("expected a name")
            );
        }
        match (indices, targets) {
            (None, _) if !lists.is_empty() => {
                Err(Fault::input("layers_pattern is set, but layers_to_transform is not"))
            }
            (Some(_), Targets::AllLinear | Targets::Pattern(_)) => {
                Err(Fault::input("layers_to_transform cannot be used where target_modules is a string")
                    .hint("PEFT refuses it as well; list the names of the layers"))
            }
            (indices, _) => {
                Ok(indices.filter(|indices| !indices.is_empty()).map(|indices| Layers { indices, lists }))
            }
        }
    }
}

fn pattern(name: &str, text: &str) -> Result<PythonRegex, Fault> {
    PythonRegex::whole(text).map_err(|reason| named(name, unreadable(text, &reason)))
}

fn named(name: &str, fault: Fault) -> Fault {
    Fault { message: format!("{name}: {}", fault.message), ..fault }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str) -> Result<AdapterConfig, Fault> {
        parse(&serde_json::from_str(json).unwrap())
    }

    fn with(extra: &str) -> Result<AdapterConfig, Fault> {
        parsed(&format!(
            r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], {extra}}}"#
        ))
    }

    #[test]
    fn neutral_peft_fields_are_accepted() {
        let config = with(
            r#""alpha_pattern": {}, "rank_pattern": {}, "alora_invocation_tokens": null, "auto_mapping": {"a": "b"},
            "arrow_config": null, "bias": "none", "eva_config": {"rho": 2.0}, "exclude_modules": null, "fan_in_fan_out": false,
            "inference_mode": true, "init_lora_weights": "gaussian", "layer_replication": null, "layers_pattern": null,
            "layers_to_transform": null, "loftq_config": {}, "lora_bias": false, "lora_dropout": 0.05, "megatron_config": null,
            "megatron_core": "megatron.core", "modules_to_save": null, "peft_version": "0.21.2", "qalora_group_size": 16,
            "revision": null, "task_type": "CAUSAL_LM", "target_parameters": null, "trainable_token_indices": null,
            "use_dora": false, "use_qalora": false, "use_rslora": null, "velora_config": null, "ensure_weight_tying": false,
            "enable_lora": null, "merge_weights": false, "base_model_name_or_path": "org/name""#,
        )
        .unwrap();
        assert_eq!(
            (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora),
            (4, 8.0, 0.05, false)
        );
        assert_eq!(config.base.as_deref(), Some("org/name"));
        let bare = parsed(r#"{"peft_type": "LORA"}"#).unwrap();
        assert_eq!((bare.r, bare.lora_alpha), (8, 8.0));
        assert!(matches!(bare.targets, Targets::Names(names) if names == ["q_proj", "v_proj"]));
    }

    #[test]
    fn a_field_that_is_not_neutral_is_refused_with_its_value() {
        let refused = [
            (r#""bias": "lora_only""#, "bias = \"lora_only\" is not supported"),
            (r#""lora_bias": true, "use_dora": true"#, "lora_bias cannot be used with use_dora"),
            (
                r#""lora_bias": true, "init_lora_weights": "gaussian""#,
                "lora_bias cannot be used with init_lora",
            ),
            (r#""trainable_token_indices": [1]"#, "trainable_token_indices = [1]"),
            (r#""trainable_token_indices": {"embed_tokens": [1]}"#, "trainable_token_indices = "),
            (r#""layer_replication": [[0, 1]]"#, "layer_replication = [[0,1]]"),
            (r#""target_parameters": ["a"]"#, "target_parameters"),
            (r#""use_qalora": true"#, "use_qalora"),
            (r#""megatron_config": {"a": 1}"#, "megatron_config"),
            (r#""corda_config": {"a": 1}"#, "corda_config"),
            (r#""loftq_config": {"loftq_bits": 4}"#, "loftq_config"),
            (r#""arrow_config": {"top_k": 3}"#, "arrow_config"),
            (r#""alora_invocation_tokens": [1]"#, "alora_invocation_tokens"),
            (r#""ensure_weight_tying": true"#, "ensure_weight_tying"),
            (r#""init_lora_weights": "pissa_niter_4""#, "init_lora_weights = \"pissa_niter_4\""),
            (r#""init_lora_weights": "olora""#, "init_lora_weights"),
            (r#""task_type": "SEQ_CLS""#, "task_type = \"SEQ_CLS\""),
            (r#""some_new_thing": 3"#, "some_new_thing = 3 is not supported"),
        ];
        for (field, message) in refused {
            let fault = with(field).unwrap_err();
            assert!(fault.message.contains(message) && !fault.hint.is_empty(), "{field}: {fault}");
        }
        for kind in [r#"{"peft_type": "IA3"}"#, "{}"] {
            assert!(parsed(kind).unwrap_err().message.starts_with("peft_type = "), "{kind}");
        }
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named() {
        for (field, message) in [
            (r#""use_rslora": "yes""#, "use_rslora = \"yes\": expected true or false"),
            (r#""layers_to_transform": ["a"]"#, "layers_to_transform"),
            (r#""rank_pattern": {"q_proj": 2.5}"#, "rank_pattern holds 2.5"),
            (r#""rank_pattern": {"q_proj": 0}"#, "rank_pattern holds 0"),
            (r#""rank_pattern": {"q_proj": "2"}"#, "rank_pattern: the value of \"q_proj\""),
            (r#""alpha_pattern": {"(?!a)": 2}"#, "alpha_pattern: the regular expression \"(?!a)\""),
            (r#""alpha_pattern": [2]"#, "alpha_pattern = [2]: expected an object"),
            (r#""layers_pattern": "layers""#, "layers_to_transform is not"),
            (r#""modules_to_save": "lm_head""#, "modules_to_save = \"lm_head\": expected a list of names"),
            (r#""exclude_modules": [1]"#, "exclude_modules = [1]: expected a list of names"),
            (r#""exclude_modules": "(""#, "exclude_modules: the regular expression"),
        ] {
            let fault = with(field).unwrap_err();
            assert!(fault.message.contains(message), "{field}: {fault}");
        }
        let negative = parsed(r#"{"peft_type": "LORA", "r": 0}"#).unwrap_err();
        assert_eq!(negative.message, "r = 0: expected at least 1");
    }

    #[test]
    fn layers_to_transform_needs_a_list_of_target_modules() {
        let layers = |extra: &str| with(extra).unwrap().layers;
        assert!(matches!(layers(r#""layers_to_transform": 1"#), Some(layers) if layers.indices == [1]));
        assert!(layers(r#""layers_to_transform": []"#).is_none());
        let fault =
            parsed(r#"{"peft_type": "LORA", "target_modules": "all-linear", "layers_to_transform": [1]}"#);
        assert!(fault.unwrap_err().message.starts_with("layers_to_transform cannot be used"));
    }
}

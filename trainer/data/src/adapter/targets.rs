//! Which layers an adapter adapts, with which rank and scale: PEFT's rules over the names of a model's modules.

use std::collections::HashSet;

use dyad_proto::Fault;
use serde_json::{Map, Value};

use super::AdapterConfig;
use super::python_regex::PythonRegex;

/// The modules of a model, by the names that PEFT sees.
#[derive(Clone, Debug)]
pub struct Modules {
    linears: Vec<String>,
    others: Vec<String>,
    /// Embedding, head and norms: the other modules with weights of their own.
    weighted: Vec<String>,
}

/// Name of the head.
pub const HEAD: &str = "lm_head";
/// Name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens";

impl Modules {
    /// A decoder with `layers` layers; `linears` and `norms` are the names inside each layer.
    #[must_use]
    pub fn of_decoder(layers: usize, linears: &[&str], norms: &[&str]) -> Self {
        let at = |layer: usize, name: &str| format!("model.layers.{layer}.{name}");
        let all = |names: &[&str]| -> Vec<String> {
            (0..layers).flat_map(|layer| names.iter().map(move |name| at(layer, name))).collect()
        };
        let mut others: Vec<String> =
            ["", "lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb"].map(str::to_owned).into();
        others.extend(all(norms));
        others.extend(all(&["mlp.act_fn"]));
        let mut weighted = vec![HEAD.to_owned(), EMBEDDING.to_owned(), "model.norm".to_owned()];
        weighted.extend(all(norms));
        let linears = all(linears);
        let inner: HashSet<String> = linears.iter().chain(&others).flat_map(|name| above(name)).collect();
        others.extend(inner);
        others.sort();
        Self { linears, others, weighted }
    }

    fn names(&self) -> impl Iterator<Item = &String> {
        self.linears.iter().chain(&self.others)
    }

    /// Last parts of the names of linear layers, e.g. `q_proj`.
    fn short_linears(&self) -> Vec<&str> {
        sorted(self.linears.iter().map(|name| short(name)))
    }
}

/// Names of the modules that contain a module.
fn above(name: &str) -> Vec<String> {
    name.match_indices('.').map(|(at, _)| name[..at].to_owned()).collect()
}

fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn sorted<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// PEFT's `target_modules`.
#[derive(Clone, Debug)]
pub enum Targets {
    /// Every linear layer except the head.
    AllLinear,
    /// Whole names, or ends of names after a dot.
    Names(Vec<String>),
    /// A pattern that matches whole names.
    Pattern(PythonRegex),
}

/// PEFT's `exclude_modules`.
#[derive(Clone, Debug)]
pub enum Exclude {
    /// No exceptions.
    Nothing,
    /// Whole names, or ends of names after a dot.
    Names(Vec<String>),
    /// A pattern that matches whole names.
    Pattern(PythonRegex),
}

/// PEFT's `layers_to_transform` and `layers_pattern`.
#[derive(Clone, Debug)]
pub struct Layers {
    /// Numbers of layers.
    pub indices: Vec<i64>,
    /// Names of the module lists that the indices refer to; empty for any list.
    pub lists: Vec<String>,
}

/// Values by name pattern: PEFT's `rank_pattern` and `alpha_pattern`. The first matching pattern counts.
#[derive(Clone, Debug, Default)]
pub struct Patterns(Vec<(String, PythonRegex, f64)>);

impl Patterns {
    /// Reads the fields of a JSON object, in their order.
    pub fn new(fields: &Map<String, Value>) -> Result<Self, Fault> {
        let pattern = |(pattern, value): (&String, &Value)| {
            let number = value
                .as_f64()
                .ok_or_else(|| Fault::input(format!("the value of {pattern:?} is {value}, not a number")))?;
            let regex = PythonRegex::ending(pattern).map_err(|reason| unreadable(pattern, &reason))?;
            Ok((pattern.clone(), regex, number))
        };
        fields.iter().map(pattern).collect::<Result<_, _>>().map(Self)
    }

    /// Whether there are no patterns.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The values, in order.
    pub fn values(&self) -> impl Iterator<Item = f64> + '_ {
        self.0.iter().map(|(_, _, value)| *value)
    }

    /// The JSON object that PEFT reads.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let whole = |value: f64| if value.fract() == 0.0 { Value::from(value as i64) } else { value.into() };
        self.0.iter().map(|(pattern, _, value)| (pattern.clone(), whole(*value))).collect()
    }

    /// The first pattern that matches none of these layers.
    #[must_use]
    pub fn unused(&self, layers: &[Adapted]) -> Option<&str> {
        let unused = |pattern: &&(String, PythonRegex, f64)| {
            !layers.iter().any(|layer| pattern.1.matches(&layer.name))
        };
        self.0.iter().find(unused).map(|(pattern, ..)| pattern.as_str())
    }

    fn of(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(_, pattern, _)| pattern.matches(name)).map(|(_, _, value)| *value)
    }
}

/// The error for a pattern that is not supported.
pub(super) fn unreadable(pattern: &str, reason: &str) -> Fault {
    Fault::input(format!("the regular expression {pattern:?} is not supported: {reason}"))
        .hint("write it with groups, alternatives, character classes and repetitions only, or list the names of the layers")
}

/// One adapted layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapted {
    /// Name of the layer, e.g. `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Rank.
    pub rank: i64,
    /// `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA.
    pub scale: f64,
}

impl AdapterConfig {
    /// Returns the layers that PEFT would adapt, in the model's order. Fails if one is not a linear layer inside a decoder layer.
    pub fn select(&self, modules: &Modules) -> Result<Vec<Adapted>, Fault> {
        let chosen = |name: &&String| {
            !self.exclude.takes(name) && !self.keeps_whole(name) && self.targets_take(name, modules)
        };
        if let Some(other) = modules.others.iter().find(chosen) {
            return Err(not_supported(other, modules));
        }
        let adapted: Vec<Adapted> =
            modules.linears.iter().filter(chosen).map(|name| self.adapted(name)).collect();
        if adapted.is_empty() {
            return Err(Fault::input("target_modules match no linear layer")
                .hint(format!("layers of this model: {}", modules.short_linears().join(", "))));
        }
        Ok(adapted)
    }

    /// Returns the modules that PEFT would train whole, in the order of the model's names. Fails if one has no weights of its own.
    pub fn saved(&self, modules: &Modules) -> Result<Vec<String>, Fault> {
        // PEFT compares the ends of names, also inside a part: `norm` means every norm.
        let chosen = |name: &&String| self.modules_to_save.iter().any(|end| name.ends_with(end.as_str()));
        let has_weights = |name: &&String| modules.linears.contains(name) || modules.weighted.contains(name);
        let mut saved: Vec<String> = modules.names().filter(chosen).cloned().collect();
        if let Some(other) = saved.iter().find(|name| !has_weights(name)) {
            let what = if other.is_empty() { "the whole model" } else { other };
            return Err(Fault::input(format!("modules_to_save: training {what} is not supported")).hint(
                format!(
                    "{HEAD}, embed_tokens, norms and linear layers: {}",
                    modules.short_linears().join(", ")
                ),
            ));
        }
        saved.sort();
        Ok(saved)
    }

    /// Whether a module, or one that contains it, is trained whole and so has no adapter.
    fn keeps_whole(&self, name: &str) -> bool {
        let inside = |part: &String| {
            let starts = name.match_indices(part.as_str()).map(|(at, _)| at);
            let mut starts = starts.filter(|at| *at == 0 || name[..*at].ends_with('.'));
            starts.any(|at| matches!(name[at + part.len()..].chars().next(), None | Some('.')))
        };
        self.modules_to_save.iter().filter(|part| !part.is_empty()).any(inside)
    }

    fn adapted(&self, name: &str) -> Adapted {
        let rank = self.rank_pattern.of(name).map_or(self.r, |rank| rank as i64);
        let alpha = self.alpha_pattern.of(name).unwrap_or(self.lora_alpha);
        let scale = if self.use_rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 };
        Adapted { name: name.to_owned(), rank, scale }
    }

    fn targets_take(&self, name: &str, modules: &Modules) -> bool {
        match &self.targets {
            Targets::AllLinear => modules.linears.iter().any(|linear| linear == name),
            // As in PEFT, a whole name is selected even if `layers` excludes it.
            Targets::Names(names) => {
                names.iter().any(|whole| whole == name)
                    || ends_with_one(name, names)
                        && self.layers.as_ref().is_none_or(|layers| layers.take(name))
            }
            Targets::Pattern(pattern) => pattern.matches(name),
        }
    }
}

impl Exclude {
    fn takes(&self, name: &str) -> bool {
        match self {
            Self::Nothing => false,
            Self::Names(names) => ends_with_one(name, names),
            Self::Pattern(pattern) => pattern.matches(name),
        }
    }
}

impl Layers {
    fn take(&self, name: &str) -> bool {
        self.index(name).is_some_and(|index| self.indices.contains(&index))
    }

    /// The index after the name of a module list, as PEFT finds it.
    fn index(&self, name: &str) -> Option<i64> {
        let parts: Vec<&str> = name.split('.').collect();
        // A part must follow the number. If any list is allowed, a part must precede the list's name too.
        let numbered = |at: &usize| at + 2 < parts.len() && is_number(parts[at + 1]);
        if self.lists.is_empty() {
            let at = (1..parts.len()).find(numbered)?;
            return parts[at + 1].parse().ok();
        }
        self.lists.iter().find_map(|list| {
            let at = (0..parts.len()).find(|at| parts[*at] == list && numbered(at))?;
            parts[at + 1].parse().ok()
        })
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn ends_with_one(name: &str, names: &[String]) -> bool {
    names.iter().any(|one| ends_with(name, one))
}

/// Whether `end` is the whole name, or its end after a dot.
fn ends_with(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn not_supported(name: &str, modules: &Modules) -> Fault {
    let what = if name.is_empty() { "the whole model" } else { name };
    Fault::input(format!("an adapter on {what} is not supported")).hint(format!(
        "adapters go on linear layers inside decoder layers: {}",
        modules.short_linears().join(", ")
    ))
}

/// Fails if a name from the run's configuration matches no layer.
pub fn check_names(key: &str, names: &[String], modules: &Modules) -> Result<(), Fault> {
    for name in names {
        if modules.linears.iter().any(|linear| ends_with(linear, name)) {
            continue;
        }
        if let Some(other) = modules.others.iter().find(|other| ends_with(other, name)) {
            let fault = not_supported(other, modules);
            return Err(Fault { message: format!("{key} {name:?}: {}", fault.message), ..fault });
        }
        let known = modules.short_linears();
        let nearest = nearest(name, &[known.as_slice(), &["all-linear"]].concat())
            .map(|near| format!("did you mean {near:?}? "));
        return Err(Fault::input(format!("{key} {name:?} matches no linear layer of this model"))
            .hint(format!("{}layers of this model: {}", nearest.unwrap_or_default(), known.join(", "))));
    }
    Ok(())
}

/// Fails if an exception or a pattern from the run's configuration has no effect: it is probably misspelt.
pub fn check_effect(config: &AdapterConfig, adapted: &[Adapted], modules: &Modules) -> Result<(), Fault> {
    let none = |what: String, hint: &str| Err(Fault::input(what).hint(hint.to_owned()));
    for (key, patterns) in [("rank_pattern", &config.rank_pattern), ("alpha_pattern", &config.alpha_pattern)]
    {
        if let Some(pattern) = patterns.unused(adapted) {
            return none(
                format!("{key}: {pattern:?} matches no layer that gets an adapter"),
                "a pattern matches the end of a layer's name, after a dot: q_proj, or layers.0.mlp.down_proj",
            );
        }
    }
    if let Some(name) =
        config.modules_to_save.iter().find(|end| !modules.names().any(|name| name.ends_with(end.as_str())))
    {
        let known: Vec<&str> =
            modules.weighted.iter().chain(&modules.linears).map(|name| short(name)).collect();
        let hint = nearest(name, &known).map(|near| format!("did you mean {near:?}?"));
        return none(
            format!("modules_to_save: {name:?} matches no module of this model"),
            hint.as_deref().unwrap_or("for example [\"embed_tokens\", \"lm_head\"]"),
        );
    }
    let everything = || modules.names();
    let (unused, known) = match &config.exclude {
        Exclude::Nothing => return Ok(()),
        Exclude::Names(names) => (
            names.iter().find(|name| !everything().any(|module| ends_with(module, name))).cloned(),
            modules.short_linears().join(", "),
        ),
        Exclude::Pattern(pattern) => (
            (!everything().any(|module| pattern.matches(module)))
                .then(|| "the regular expression".to_owned()),
            "it must match a whole name such as model.layers.0.self_attn.q_proj".to_owned(),
        ),
    };
    match unused {
        Some(name) => none(format!("exclude_modules: {name:?} matches no module of this model"), &known),
        None => Ok(()),
    }
}

fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let likeness = |other: &str| strsim::jaro_winkler(short(name), other);
    known
        .iter()
        .copied()
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
        .filter(|near| likeness(near) > 0.75)
}

/// The shortest `target_modules` that selects exactly these layers.
#[must_use]
pub fn target_modules(adapted: &[Adapted], modules: &Modules) -> Vec<String> {
    let shorts = sorted(adapted.iter().map(|layer| short(&layer.name)));
    let meant = modules.linears.iter().filter(|name| shorts.contains(&short(name))).count();
    if meant == adapted.len() {
        return shorts.into_iter().map(str::to_owned).collect();
    }
    adapted.iter().map(|layer| layer.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Modules {
        Modules::of_decoder(
            3,
            &["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
            &["input_layernorm"],
        )
    }

    fn names(list: &[&str]) -> Targets {
        Targets::Names(list.iter().map(|name| (*name).to_owned()).collect())
    }

    fn plain(targets: Targets) -> AdapterConfig {
        let keys = serde_json::json!({ "r": 4, "lora_alpha": 8.0 });
        AdapterConfig::of_run(keys.as_object().unwrap().clone(), targets).unwrap()
    }

    fn selected(config: &AdapterConfig) -> Vec<String> {
        let adapted = config.select(&modules()).unwrap();
        adapted.into_iter().map(|layer| layer.name.replace("model.layers.", "")).collect()
    }

    #[test]
    fn suffixes_whole_names_and_patterns_choose_layers() {
        assert_eq!(
            selected(&plain(names(&["q_proj"]))),
            ["0.self_attn.q_proj", "1.self_attn.q_proj", "2.self_attn.q_proj"]
        );
        assert_eq!(
            selected(&plain(names(&["model.layers.2.mlp.down_proj", "1.self_attn.v_proj"]))),
            ["1.self_attn.v_proj", "2.mlp.down_proj"]
        );
        let pattern = PythonRegex::whole(r"model\.layers\.[02]\.self_attn\.q_proj").unwrap();
        assert_eq!(selected(&plain(Targets::Pattern(pattern))), ["0.self_attn.q_proj", "2.self_attn.q_proj"]);
        assert_eq!(selected(&plain(Targets::AllLinear)).len(), 9);
        assert!(plain(names(&["proj"])).select(&modules()).is_err());
    }

    #[test]
    fn exceptions_and_layer_numbers_narrow_the_choice() {
        let mut config = plain(names(&["q_proj", "v_proj"]));
        config.exclude = Exclude::Names(vec!["v_proj".into()]);
        config.layers = Some(Layers { indices: vec![0, 2, 7], lists: Vec::new() });
        assert_eq!(selected(&config), ["0.self_attn.q_proj", "2.self_attn.q_proj"]);
        config.layers = Some(Layers { indices: vec![1], lists: vec!["h".into(), "layers".into()] });
        assert_eq!(selected(&config), ["1.self_attn.q_proj"]);
        config.layers = Some(Layers { indices: vec![1], lists: vec!["h".into()] });
        assert!(config.select(&modules()).is_err());
    }

    #[test]
    fn targets_outside_linear_decoder_layers_are_refused_by_name() {
        for (target, named) in
            [("lm_head", "lm_head"), ("embed_tokens", "model.embed_tokens"), ("self_attn", "self_attn")]
        {
            let fault = plain(names(&["q_proj", target])).select(&modules()).unwrap_err();
            assert!(fault.message.contains(named) && fault.message.ends_with("not supported"), "{fault}");
        }
        let everything = PythonRegex::whole(".*").unwrap();
        let fault = plain(Targets::Pattern(everything)).select(&modules()).unwrap_err();
        assert!(fault.message.contains("the whole model"), "{fault}");
    }

    #[test]
    fn the_first_pattern_that_matches_gives_rank_and_alpha() {
        let fields = |json: &str| Patterns::new(&serde_json::from_str(json).unwrap()).unwrap();
        let mut config = plain(names(&["q_proj", "v_proj"]));
        config.rank_pattern = fields(r#"{"layers.1.self_attn.q_proj": 16, "q_proj": 2}"#);
        config.alpha_pattern = fields(r#"{"v_proj": 32}"#);
        let adapted = config.select(&modules()).unwrap();
        let found: Vec<(i64, f64)> = adapted.iter().take(4).map(|layer| (layer.rank, layer.scale)).collect();
        assert_eq!(found, [(2, 4.0), (4, 8.0), (16, 0.5), (4, 8.0)]);
        config.use_rslora = true;
        let adapted = config.select(&modules()).unwrap();
        assert_eq!((adapted[2].scale, adapted[1].scale), (2.0, 16.0));
    }

    #[test]
    fn modules_that_are_trained_whole_get_no_adapter() {
        let config = |names: &[&str]| {
            let keys = serde_json::json!({ "modules_to_save": names }).as_object().unwrap().clone();
            AdapterConfig::of_run(keys, Targets::AllLinear).unwrap()
        };
        let saved = |names: &[&str]| config(names).saved(&modules()).map_err(|fault| fault.message);
        assert_eq!(saved(&["embed_tokens", "lm_head"]).unwrap(), ["lm_head", "model.embed_tokens"]);
        assert_eq!(saved(&["norm"]).unwrap().len(), 4, "three layer norms and the last one");
        assert_eq!(saved(&["0.mlp.down_proj"]).unwrap(), ["model.layers.0.mlp.down_proj"]);
        assert!(saved(&["mlp"]).unwrap_err().contains("training model.layers.0.mlp is not supported"));
        assert_eq!(selected(&config(&["down_proj"])).len(), 6);
        assert_eq!(selected(&config(&["0.mlp.down_proj", "lm_head"])).len(), 8);
        // PEFT compares whole parts here.
        assert_eq!(selected(&config(&["_proj"])).len(), 9);
    }

    #[test]
    fn a_pattern_or_exception_without_effect_is_named() {
        let check = |json: serde_json::Value| {
            let keys = json.as_object().unwrap().clone();
            let config = AdapterConfig::of_run(keys, names(&["q_proj", "v_proj"])).unwrap();
            check_effect(&config, &config.select(&modules()).unwrap(), &modules())
                .map_err(|fault| fault.message)
        };
        assert_eq!(
            check(serde_json::json!({ "rank_pattern": { "q_proj": 2 }, "exclude_modules": ["norm"] })),
            Ok(())
        );
        let refused = [
            (
                serde_json::json!({ "rank_pattern": { "q_prj": 2 } }),
                "rank_pattern: \"q_prj\" matches no layer",
            ),
            (serde_json::json!({ "alpha_pattern": { "down_proj": 2 } }), "alpha_pattern: \"down_proj\""),
            (
                serde_json::json!({ "exclude_modules": ["v_prj"] }),
                "exclude_modules: \"v_prj\" matches no module",
            ),
            (
                serde_json::json!({ "modules_to_save": ["lm_hed"] }),
                "modules_to_save: \"lm_hed\" matches no module",
            ),
            (
                serde_json::json!({ "exclude_modules": "v_proj" }),
                "exclude_modules: \"the regular expression\"",
            ),
        ];
        for (keys, message) in refused {
            assert!(check(keys.clone()).unwrap_err().contains(message), "{keys}");
        }
    }

    #[test]
    fn unmatched_names_suggest_the_nearest_name() {
        let check = |name: &str| check_names("lora_trainable_modules", &[name.to_owned()], &modules());
        check("q_proj").unwrap();
        check("self_attn.q_proj").unwrap();
        let fault = check("v_prj").unwrap_err();
        assert_eq!(fault.message, "lora_trainable_modules \"v_prj\" matches no linear layer of this model");
        assert!(fault.hint.starts_with("did you mean \"v_proj\"?"), "{}", fault.hint);
        for head in ["lm_head", "embed_tokens"] {
            assert!(check(head).unwrap_err().message.ends_with("is not supported"));
        }
        assert!(check("model.layers.3.self_attn.q_proj").unwrap_err().hint.contains("\"q_proj\""));
    }

    #[test]
    fn written_target_modules_select_the_same_layers() {
        let modules = modules();
        let written = |config: &AdapterConfig| target_modules(&config.select(&modules).unwrap(), &modules);
        assert_eq!(written(&plain(Targets::AllLinear)), ["down_proj", "q_proj", "v_proj"]);
        assert_eq!(
            written(&plain(names(&["0.self_attn.q_proj", "2.self_attn.q_proj"]))),
            ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]
        );
    }
}

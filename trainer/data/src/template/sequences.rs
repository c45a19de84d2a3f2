//! Filters on sequences.

use std::cmp::Ordering;

use super::access::item;
use super::error::TemplateError;
use super::functions::Args;
use super::value::{Outcome, Value};
use super::{math, methods, tests};

pub(super) const NAMES: [&str; 22] = [
    "batch",
    "count",
    "dictsort",
    "first",
    "groupby",
    "items",
    "join",
    "last",
    "length",
    "list",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "select",
    "selectattr",
    "slice",
    "sort",
    "sum",
    "unique",
];

pub(super) fn call(name: &str, value: &Value, args: Args) -> Outcome<Value> {
    match name {
        "select" | "reject" => select(value, args, name == "select", false),
        "selectattr" | "rejectattr" => select(value, args, name == "selectattr", true),
        "join" => join(value, args),
        "sort" => sort(value, args),
        "dictsort" => dictsort(value, args),
        "unique" => unique(value, args),
        "min" | "max" => extreme(value, args, name == "max"),
        "groupby" => groupby(value, args),
        "sum" => sum(value, args),
        "batch" => batch(value, args),
        "slice" => slice(value, args),
        _ => {
            args.positional(name, 0, 0)?;
            plain(name, value)
        }
    }
}

fn plain(name: &str, value: &Value) -> Outcome<Value> {
    match name {
        "length" | "count" => match value.length() {
            Some(length) => Ok(Value::Int(length as i64)),
            None => Err(TemplateError::failed(format!("'{}' has no length", value.kind()))),
        },
        "list" => value.items().map(Value::from),
        "first" => {
            Ok(value.first()?.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
        }
        "last" => match value {
            Value::Iterator(_) => Err(TemplateError::failed("the last item of a generator")),
            _ => Ok(value
                .items()?
                .pop()
                .unwrap_or_else(|| Value::undefined("No last item, sequence was empty."))),
        },
        "reverse" => {
            let mut items = value.items()?;
            items.reverse();
            Ok(match value {
                Value::Str(text) => Value::from(text.chars().rev().collect::<String>()),
                Value::Iterator(_) => Value::from(items),
                _ => Value::iterator(items),
            })
        }
        _ => match value {
            Value::Undefined(_) => Ok(Value::iterator(Vec::new())),
            Value::Dict(pairs) => Ok(Value::iterator(methods::items(pairs))),
            _ => Err(TemplateError::failed("Can only get item pairs from a mapping.")),
        },
    }
}

/// Path to a value inside an item, such as `a.b.0`.
struct Path {
    parts: Vec<Value>,
    default: Option<Value>,
    /// Texts are compared in lower case.
    folds: bool,
}

impl Path {
    fn of(attribute: Option<&Value>) -> Self {
        let parts = match attribute {
            None | Some(Value::None) => Vec::new(),
            Some(Value::Str(text)) => text.split('.').map(part).collect(),
            Some(other) => vec![other.clone()],
        };
        Self { parts, default: None, folds: false }
    }

    fn folding(mut self, case_sensitive: Option<Value>) -> Self {
        self.folds = !case_sensitive.is_some_and(|is| is.truth());
        self
    }

    fn get(&self, value: &Value) -> Outcome<Value> {
        let mut value = value.clone();
        for part in &self.parts {
            value = item(&value, part)?;
            if value.is_undefined()
                && let Some(default) = &self.default
            {
                value = default.clone();
            }
        }
        Ok(match value {
            Value::Str(text) if self.folds => Value::from(text.to_lowercase()),
            value => value,
        })
    }
}

fn part(word: &str) -> Value {
    let is_index = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    word.parse().ok().filter(|_| is_index).map_or_else(|| Value::from(word), Value::Int)
}

pub(super) fn text_argument(args: &mut Args, what: &str) -> Outcome<std::rc::Rc<str>> {
    if args.positional.is_empty() {
        return Err(TemplateError::failed(format!("{what} needs an argument")));
    }
    args.positional.remove(0).as_str().cloned()
}

/// `map` with an attribute; `None` if the arguments name a filter.
pub(super) fn map_attribute(items: &[Value], args: &Args) -> Option<Outcome<Value>> {
    let by_attribute =
        args.positional.is_empty() && args.named.iter().any(|(name, _)| &**name == "attribute");
    by_attribute.then(|| {
        let [attribute, default] = args.clone().bind("map", ["attribute", "default"], 0)?;
        let mut path = Path::of(attribute.as_ref());
        path.default = default.filter(|default| !matches!(default, Value::None));
        Ok(Value::iterator(items.iter().map(|item| path.get(item)).collect::<Outcome<_>>()?))
    })
}

pub(super) fn known(name: &str, names: &[&str], what: &str) -> Outcome<()> {
    match names.contains(&name) {
        true => Ok(()),
        false => Err(TemplateError::unsupported(format!("the {what} '{name}'"))),
    }
}

fn select(value: &Value, mut args: Args, keeps: bool, by_attribute: bool) -> Outcome<Value> {
    if !value.truth() {
        return Ok(Value::iterator(Vec::new()));
    }
    let path = match by_attribute {
        true if args.positional.is_empty() => {
            return Err(TemplateError::failed("Missing parameter for attribute name"));
        }
        true => Path::of(Some(&args.positional.remove(0))),
        false => Path::of(None),
    };
    let test = if args.positional.is_empty() { None } else { Some(text_argument(&mut args, "select")?) };
    if let Some(test) = &test {
        known(test, &tests::NAMES, "test")?;
    }
    let mut kept = Vec::new();
    for item in value.items()? {
        let wanted = path.get(&item)?;
        let passes = match &test {
            Some(test) => tests::call(test, &wanted, args.clone())?,
            None => wanted.truth(),
        };
        if passes == keeps {
            kept.push(item);
        }
    }
    Ok(Value::iterator(kept))
}

fn join(value: &Value, args: Args) -> Outcome<Value> {
    let [separator, attribute] = args.bind("join", ["d", "attribute"], 0)?;
    let separator = separator.map_or(Ok("".into()), |separator| separator.text())?;
    let path = Path::of(attribute.as_ref());
    let mut out = String::new();
    for (at, item) in value.items()?.iter().enumerate() {
        if at > 0 {
            out.push_str(&separator);
        }
        path.get(item)?.print(&mut out)?;
    }
    Ok(Value::from(out))
}

/// Sorts indices by their keys; equal keys keep their order.
pub(super) fn sort_by(order: &mut [usize], keys: &[Value]) -> Outcome<()> {
    let mut fault = None;
    // NaN has no order: the result would depend on the sorting algorithm.
    order.sort_by(|&left, &right| match keys[left].compare(&keys[right]) {
        Ok(Some(ordering)) => ordering,
        Ok(None) => {
            fault = Some(TemplateError::unsupported("sorting what has no order (nan)"));
            Ordering::Equal
        }
        Err(error) => {
            fault = Some(error);
            Ordering::Equal
        }
    });
    fault.map_or(Ok(()), Err)
}

fn sorted(items: &[Value], keys: &[Value], reverse: bool) -> Outcome<Vec<Value>> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    if reverse {
        // Python keeps the order of equal items also in a reverse sort.
        order.reverse();
    }
    sort_by(&mut order, keys)?;
    if reverse {
        order.reverse();
    }
    Ok(order.into_iter().map(|at| items[at].clone()).collect())
}

fn sort(value: &Value, args: Args) -> Outcome<Value> {
    let [reverse, case, attribute] = args.bind("sort", ["reverse", "case_sensitive", "attribute"], 0)?;
    let paths: Vec<Path> = match &attribute {
        Some(Value::Str(text)) => {
            text.split(',').map(|part| Path::of(Some(&Value::from(part))).folding(case.clone())).collect()
        }
        other => vec![Path::of(other.as_ref()).folding(case)],
    };
    let items = value.items()?;
    let key = |item: &Value| -> Outcome<Value> {
        let parts = paths.iter().map(|path| path.get(item)).collect::<Outcome<Vec<_>>>()?;
        Ok(Value::from(parts))
    };
    let keys = items.iter().map(key).collect::<Outcome<Vec<_>>>()?;
    sorted(&items, &keys, reverse.is_some_and(|is| is.truth())).map(Value::from)
}

fn dictsort(value: &Value, args: Args) -> Outcome<Value> {
    let [case, by, reverse] = args.bind("dictsort", ["case_sensitive", "by", "reverse"], 0)?;
    let at = match by {
        None => 0,
        Some(by) => match &**by.as_str()? {
            "key" => 0,
            "value" => 1,
            _ => return Err(TemplateError::failed("You can only sort by either \"key\" or \"value\"")),
        },
    };
    let Value::Dict(pairs) = value else {
        return Err(TemplateError::failed(format!("'dictsort' cannot be applied to '{}'", value.kind())));
    };
    let path = Path::of(Some(&Value::Int(at))).folding(case);
    let items = methods::items(pairs);
    let keys = items.iter().map(|item| path.get(item)).collect::<Outcome<Vec<_>>>()?;
    sorted(&items, &keys, reverse.is_some_and(|is| is.truth())).map(Value::from)
}

fn unique(value: &Value, args: Args) -> Outcome<Value> {
    let [case, attribute] = args.bind("unique", ["case_sensitive", "attribute"], 0)?;
    let path = Path::of(attribute.as_ref()).folding(case);
    let mut seen: Vec<Value> = Vec::new();
    let mut kept = Vec::new();
    for item in value.items()? {
        let key = path.get(&item)?;
        key.hashable()?;
        let mut known = false;
        for other in &seen {
            known = known || other.equals(&key)?;
        }
        if !known {
            seen.push(key);
            kept.push(item);
        }
    }
    Ok(Value::iterator(kept))
}

fn extreme(value: &Value, args: Args, largest: bool) -> Outcome<Value> {
    let [case, attribute] = args.bind("min", ["case_sensitive", "attribute"], 0)?;
    let path = Path::of(attribute.as_ref()).folding(case);
    let mut best: Option<(Value, Value)> = None;
    for item in value.items()? {
        let key = path.get(&item)?;
        let better = match &best {
            None => true,
            Some((_, other)) if largest => other.compare(&key)?.is_some_and(Ordering::is_lt),
            Some((_, other)) => key.compare(other)?.is_some_and(Ordering::is_lt),
        };
        if better {
            best = Some((item, key));
        }
    }
    Ok(best.map_or_else(|| Value::undefined("No aggregated item, sequence was empty."), |(item, _)| item))
}

fn groupby(value: &Value, args: Args) -> Outcome<Value> {
    let [attribute, default, case] = args.bind("groupby", ["attribute", "default", "case_sensitive"], 1)?;
    let default = default.filter(|default| !matches!(default, Value::None));
    let path = |folds: bool| Path { default: default.clone(), folds, ..Path::of(attribute.as_ref()) };
    let folds = !case.is_some_and(|is| is.truth());
    let items = value.items()?;
    let keys = items.iter().map(|item| path(folds).get(item)).collect::<Outcome<Vec<_>>>()?;
    let items = sorted(&items, &keys, false)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for item in items {
        let key = path(folds).get(&item)?;
        match groups.last_mut() {
            Some((last, group)) if last.equals(&key)? => group.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let group = |(key, items): (Value, Vec<Value>)| -> Outcome<Value> {
        // The key in the case of the first item.
        let key = if folds { path(false).get(&items[0])? } else { key };
        Ok(Value::Group(vec![key, Value::from(items)].into()))
    };
    Ok(Value::from(groups.into_iter().map(group).collect::<Outcome<Vec<_>>>()?))
}

fn sum(value: &Value, args: Args) -> Outcome<Value> {
    let [attribute, start] = args.bind("sum", ["attribute", "start"], 0)?;
    let path = Path::of(attribute.as_ref());
    let mut total = start.unwrap_or(Value::Int(0));
    if matches!(total, Value::Str(_)) {
        return Err(TemplateError::failed("sum() can't sum strings"));
    }
    for item in value.items()? {
        let item = path.get(&item)?;
        // Python 3.12 and later sum floats with higher precision.
        if matches!(item, Value::Float(_)) || matches!(total, Value::Float(_)) {
            return Err(TemplateError::unsupported("the sum of numbers that are not whole"));
        }
        total = math::apply(super::ast::Math::Add, &total, &item)?;
    }
    Ok(total)
}

fn batch(value: &Value, args: Args) -> Outcome<Value> {
    let [count, fill] = args.bind("batch", ["linecount", "fill_with"], 1)?;
    let count = count.unwrap_or(Value::None).integer()?;
    let count = usize::try_from(count).ok().filter(|&count| count > 0 && count <= 1 << 16);
    let count = count.ok_or_else(|| TemplateError::unsupported("batches of that many items"))?;
    let mut batches: Vec<Vec<Value>> = value.items()?.chunks(count).map(<[Value]>::to_vec).collect();
    if let (Some(fill), Some(last)) = (fill.filter(|fill| !matches!(fill, Value::None)), batches.last_mut()) {
        last.resize(count, fill);
    }
    Ok(Value::iterator(batches.into_iter().map(Value::from).collect()))
}

fn slice(value: &Value, args: Args) -> Outcome<Value> {
    let [slices, fill] = args.bind("slice", ["slices", "fill_with"], 1)?;
    let slices = slices.unwrap_or(Value::None).integer()?;
    let slices = usize::try_from(slices).ok().filter(|&slices| slices > 0 && slices <= 1 << 16);
    let slices = slices.ok_or_else(|| TemplateError::failed("'slice' needs a number of slices"))?;
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
    let items = value.items()?;
    let (each, longer) = (items.len() / slices, items.len() % slices);
    let mut rest = items.into_iter();
    let made = (0..slices).map(|at| {
        let mut part: Vec<Value> = rest.by_ref().take(each + usize::from(at < longer)).collect();
        part.extend(fill.clone().filter(|_| at >= longer));
        Value::from(part)
    });
    Ok(Value::iterator(made.collect()))
}

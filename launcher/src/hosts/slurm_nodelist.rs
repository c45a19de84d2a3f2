//! Parser of Slurm's node lists, such as `gpu[01-03,7],login`. Pure.

use dyad_proto::Fault;

/// Largest number of nodes in a list.
const MOST: usize = 65_536;

/// All node names of a list, in its order.
pub fn expand(list: &str) -> Result<Vec<String>, Fault> {
    let mut names = Vec::new();
    for entry in entries(list).map_err(|why| wrong(list, &why))? {
        names.extend(expand_entry(&entry, MOST - names.len()).map_err(|why| wrong(list, &why))?);
    }
    if names.is_empty() { Err(wrong(list, "it names no node")) } else { Ok(names) }
}

fn wrong(list: &str, why: &str) -> Fault {
    Fault::input(format!("SLURM_JOB_NODELIST \"{list}\": {why}"))
        .hint("expected names as Slurm writes them, such as gpu[01-04],login")
}

/// Splits at commas outside brackets.
fn entries(list: &str) -> Result<Vec<String>, String> {
    let mut entries = vec![String::new()];
    let mut inside = false;
    for c in list.trim().chars() {
        match (c, inside) {
            ('[', true) => return Err("a bracket inside brackets".into()),
            (']', false) => return Err("a closing bracket without an opening one".into()),
            ('[', false) => inside = true,
            (']', true) => inside = false,
            (',', false) => {
                entries.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(entry) = entries.last_mut() {
            entry.push(c);
        }
    }
    if inside {
        return Err("a bracket is not closed".into());
    }
    if entries.iter().any(String::is_empty) {
        return Err("an empty name".into());
    }
    Ok(entries)
}

/// Expands all brackets of an entry; several brackets give all combinations.
fn expand_entry(entry: &str, most: usize) -> Result<Vec<String>, String> {
    let mut names = vec![String::new()];
    let mut rest = entry;
    while let Some((before, after)) = rest.split_once('[') {
        let (inner, after) = after.split_once(']').ok_or("a bracket is not closed")?;
        let numbers = numbers(inner, most)?;
        if names.len().saturating_mul(numbers.len()) > most {
            return Err(format!("more than {MOST} nodes"));
        }
        names = names
            .iter()
            .flat_map(|name| numbers.iter().map(move |number| format!("{name}{before}{number}")))
            .collect();
        rest = after;
    }
    names.iter_mut().for_each(|name| name.push_str(rest));
    Ok(names)
}

/// Expands a list such as `01-03,7`; numbers of a range are padded to the width of its first.
fn numbers(text: &str, most: usize) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for item in text.split(',') {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let number = |text: &str| match text.parse::<u64>() {
            Ok(number) if text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(number),
            _ => Err(format!("\"{item}\" is no number or range")),
        };
        let (from, to) = (number(first)?, number(last)?);
        if from > to || to - from >= (most - all.len().min(most)) as u64 {
            return Err(format!("\"{item}\" is no range of at most {MOST} nodes"));
        }
        let width = first.len();
        all.extend((from..=to).map(|number| format!("{number:0width$}")));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn valid_lists_are_expanded() {
        let expand = |list: &str| expand(list).unwrap().join(" ");
        assert_eq!(expand("login"), "login");
        assert_eq!(expand("gpu[01-03,7],cpu-1"), "gpu01 gpu02 gpu03 gpu7 cpu-1");
        assert_eq!(expand("r[1-2]n[08-10]"), "r1n08 r1n09 r1n10 r2n08 r2n09 r2n10");
        assert_eq!(expand("n[9-11].cluster"), "n9.cluster n10.cluster n11.cluster");
        assert_eq!(expand("n[098-101]"), "n098 n099 n100 n101");
    }

    #[test]
    fn invalid_lists_are_refused() {
        for list in ["", ",", "a,,b", "a[", "a]", "a[1", "a[]", "a[1-]", "a[3-1]", "a[x]", "a[[1]]", "a[+1]"]
        {
            assert!(expand(list).is_err(), "{list}");
        }
        assert!(expand("a[0-99999]").unwrap_err().message.contains("65536"));
        assert!(expand("a[0-999]b[0-999]").unwrap_err().message.contains("65536"));
        assert!(expand("a[0-18446744073709551615]").is_err());
    }

    proptest! {
        /// Compresses names into ranges, as Slurm does; expanding gives the names back.
        #[test]
        fn expanding_undoes_compressing(
            prefix in "[a-z]{1,6}-?",
            suffix in "(\\.[a-z]{1,4})?",
            width in 1usize..5,
            numbers in proptest::collection::btree_set(0u64..3000, 1..60),
        ) {
            let names: Vec<String> = numbers.iter().map(|n| format!("{prefix}{n:0width$}{suffix}")).collect();
            let mut items: Vec<(u64, u64)> = Vec::new();
            for number in numbers {
                match items.last_mut() {
                    Some((_, last)) if *last + 1 == number => *last = number,
                    _ => items.push((number, number)),
                }
            }
            let item = |(first, last): &(u64, u64)| match first == last {
                true => format!("{first:0width$}"),
                false => format!("{first:0width$}-{last:0width$}"),
            };
            let inner = items.iter().map(item).collect::<Vec<_>>().join(",");
            prop_assert_eq!(expand(&format!("{prefix}[{inner}]{suffix}")).unwrap(), names);
        }

        #[test]
        fn no_list_makes_it_panic(list in "[a-c0-9\\[\\],-]{0,40}") {
            if let Ok(names) = expand(&list) {
                prop_assert!(names.iter().all(|name| !name.is_empty() && !name.contains(['[', ']', ','])));
            }
        }
    }
}

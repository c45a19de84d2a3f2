//! Compares the facts that every rank reports with those of the other ranks and of the checkpoint. Pure.
//!
//! - CRD-B1: no row is recorded if ranks differ: every rank reports its facts before it reports work, and a row needs all ranks.

use dyad_proto::Fault;
use dyad_proto::fingerprint::{Change, Fingerprint, fact, fact_changes, may_differ_between_ranks};
use dyad_proto::wire::Fact;

use crate::run::membership::Member;

/// Facts of all ranks, in the batches in which they arrive.
#[derive(Debug)]
pub struct RankFacts {
    /// By rank: the batches that are not compared yet, oldest first.
    waiting: Vec<Vec<Vec<Fact>>>,
    /// Batches that all ranks have sent.
    compared: usize,
}

/// A fact by which ranks differ, with its value by rank; `None` for a rank that does not report it.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    name: String,
    values: Vec<Option<String>>,
}

/// The checkpoint's record, with which a resumed run is compared.
#[derive(Clone, Debug, Default)]
pub struct Then {
    /// Fingerprint of the run when the checkpoint was made.
    pub fingerprint: Fingerprint,
    /// Its step.
    pub step: u64,
}

/// A batch on which all ranks agree, except for facts that may differ.
#[derive(Debug)]
pub struct Agreed {
    /// The facts of rank 0.
    pub facts: Vec<Fact>,
    /// Warnings for the log about facts that differ.
    pub warnings: Vec<String>,
}

impl RankFacts {
    /// No facts yet.
    #[must_use]
    pub fn new(world_size: usize) -> Self {
        Self { waiting: vec![Vec::new(); world_size], compared: 0 }
    }

    /// Takes a rank's next batch. Once all ranks have sent theirs, returns the agreed facts, or fails if the ranks differ.
    pub fn hear(
        &mut self,
        place: usize,
        batch: Vec<Fact>,
        members: &[Member],
    ) -> Result<Option<Agreed>, Fault> {
        self.waiting[place].push(batch);
        if self.waiting.iter().any(Vec::is_empty) {
            return Ok(None);
        }
        let batches: Vec<Vec<Fact>> = self.waiting.iter_mut().map(|batches| batches.remove(0)).collect();
        self.compared += 1;
        let mut warnings = Vec::new();
        for difference in differences(&batches) {
            if !may_differ_between_ranks(&difference.name) {
                return Err(refusal(&difference, members));
            }
            let words = told(&difference, members);
            warnings.push(format!(
                "{words}: sums may round differently there, and a run on other hosts with them"
            ));
        }
        Ok(batches.into_iter().next().map(|facts| Agreed { facts, warnings }))
    }

    /// Whether the batch compared last is the first one, which holds all facts about files.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.compared == 1
    }
}

impl Then {
    /// Fails if the run would not compute the same as the checkpoint's run; returns changes that only affect rounding. `whole` means that
    /// `now` holds the facts of all files, so that a missing one counts as a change.
    pub fn check(&self, now: &[Fact], whole: bool) -> Result<Vec<Change>, Fault> {
        if let Some(step) = now.iter().find(|fact| fact.name == fact::STEP)
            && step.value != self.step.to_string()
        {
            let then = self.step.to_string();
            return Err(not_the_same(&Change { name: step.name.clone(), then, now: step.value.clone() }));
        }
        let mut then = self.fingerprint.facts.clone();
        if then.is_empty() {
            return Ok(Vec::new());
        }
        if !whole {
            then.retain(|name, _| now.iter().any(|fact| fact.name == *name));
        }
        fact_changes(&then, now).map_err(|change| not_the_same(&change))
    }
}

fn not_the_same(change: &Change) -> Fault {
    Fault::input(format!("cannot resume: {change}")).hint(
        "a resume goes on with the same run: put back what was changed; or start a new run from the checkpoint with \
         from_checkpoint and another output_dir",
    )
}

/// The differing facts, in the order of rank 0; facts that only other ranks report come last.
fn differences(batches: &[Vec<Fact>]) -> Vec<Difference> {
    let mut names: Vec<&str> = Vec::new();
    for fact in batches.iter().flatten() {
        if !names.contains(&fact.name.as_str()) {
            names.push(&fact.name);
        }
    }
    let value = |batch: &Vec<Fact>, name: &str| {
        batch.iter().find(|fact| fact.name == name).map(|fact| fact.value.clone())
    };
    let differs = names.into_iter().filter_map(|name| {
        let values: Vec<Option<String>> = batches.iter().map(|batch| value(batch, name)).collect();
        let equal = values.iter().all(|value| *value == values[0]);
        (!equal).then(|| Difference { name: name.to_owned(), values })
    });
    differs.collect()
}

fn refusal(difference: &Difference, members: &[Member]) -> Fault {
    let hint = match difference.name.as_str() {
        fact::LIBTORCH | fact::BUILD => {
            "start all trainers from one build; launcher --push brings it to every host"
        }
        fact::DTYPE => "set dtype to \"float32\" or \"bfloat16\": \"auto\" follows each host's processor",
        fact::STEP | fact::STATES => {
            "every host reads the checkpoint from its own output_dir: copy the folder of rank 0's host to the others, or \
             use a file system that all hosts share"
        }
        fact::WEIGHTS | fact::ADAPTER => {
            "the hosts' copies of the model differ: make them equal, or set model_loading = \"broadcast\""
        }
        _ => "the hosts' copies of the model folder differ: make them equal",
    };
    Fault::input(format!("the trainers would not compute the same: {}", told(difference, members))).hint(hint)
}

/// Text such as `dtype is Float at trainer rank 0 (a) on h0, but BFloat16 at trainer rank 1 (b) on h1`. For each value it names the first
/// rank and the number of further ones.
fn told(difference: &Difference, members: &[Member]) -> String {
    let mut said: Vec<(&Option<String>, usize, usize)> = Vec::new();
    for (rank, value) in difference.values.iter().enumerate() {
        match said.iter_mut().find(|(known, ..)| *known == value) {
            Some((_, _, count)) => *count += 1,
            None => said.push((value, rank, 1)),
        }
    }
    let words = said.into_iter().map(|(value, rank, count)| {
        let member = &members[rank];
        let host = if member.host.is_empty() { String::new() } else { format!(" on {}", member.host) };
        let others = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
        let value = value.as_deref().map_or_else(|| "absent".to_owned(), shown);
        format!("{value} at {}{host}{others}", member.describe())
    });
    format!("{} is {}", shown(&difference.name), words.collect::<Vec<_>>().join(", but "))
}

/// A peer's text for a message: at most 160 characters, without control characters.
fn shown(text: &str) -> String {
    text.chars().take(160).map(|char| if char.is_control() { ' ' } else { char }).collect()
}

#[cfg(test)]
mod tests {

    use dyad_proto::PROTOCOL_VERSION;
    use dyad_proto::wire::Hello;

    use super::*;
    use crate::run::membership::{Roster, TrainerId};

    fn members(count: u32) -> Vec<Member> {
        let mut roster = Roster::new(count as usize);
        for index in 0..count {
            let hello = Hello {
                name: format!("t{index}"),
                protocol_version: PROTOCOL_VERSION,
                device: "cpu".into(),
                host: format!("h{index}"),
                launch_index: index,
                ..Hello::default()
            };
            roster.admit(TrainerId(index.into()), &hello).unwrap();
        }
        roster.assign_ranks();
        roster.members().to_vec()
    }

    fn batch(pairs: &[(&str, &str)]) -> Vec<Fact> {
        pairs.iter().map(|(name, value)| Fact { name: (*name).into(), value: (*value).into() }).collect()
    }

    /// The result for three ranks with these batches.
    fn heard(batches: [&[(&str, &str)]; 3]) -> Result<Agreed, Fault> {
        let (mut facts, members) = (RankFacts::new(3), members(3));
        assert!(facts.hear(1, batch(batches[1]), &members).unwrap().is_none());
        assert!(facts.hear(2, batch(batches[2]), &members).unwrap().is_none());
        facts.hear(0, batch(batches[0]), &members).map(Option::unwrap)
    }

    #[test]
    fn the_differing_rank_is_named_with_its_host() {
        let same: &[(&str, &str)] = &[("config.json rope_theta", "1.0"), ("tokenizer.json", "x")];
        assert_eq!(heard([same, same, same]).unwrap().facts, batch(same));
        let other: &[(&str, &str)] = &[("config.json rope_theta", "1.0"), ("tokenizer.json", "y")];
        let fault = heard([same, same, other]).unwrap_err();
        assert_eq!(
            fault.message,
            "the trainers would not compute the same: tokenizer.json is x at trainer rank 0 (t0) on h0 and 1 more, \
             but y at trainer rank 2 (t2) on h2"
        );
        assert_eq!(fault.code.exit_status(), 2);
    }

    #[test]
    fn a_fact_missing_on_some_ranks_is_a_difference() {
        let (without, with): (&[_], &[_]) = (&[("a", "1")], &[("a", "1"), ("chat_template.jinja", "2")]);
        for batches in [[without, with, with], [with, without, with]] {
            let message = heard(batches).unwrap_err().message;
            assert!(
                message.contains("chat_template.jinja is ") && message.contains("absent at"),
                "{message}"
            );
        }
    }

    #[test]
    fn processors_may_differ_with_a_warning() {
        let (one, other): (&[_], &[_]) = (&[(fact::PROCESSOR, "a")], &[(fact::PROCESSOR, "b")]);
        let agreed = heard([one, other, other]).unwrap();
        assert!(
            agreed.warnings[0].contains("a at trainer rank 0 (t0) on h0, but b at trainer rank 1 (t1) on h1")
        );
        assert!(heard([one, one, one]).unwrap().warnings.is_empty());
    }

    #[test]
    fn batches_of_a_rank_ahead_wait_for_the_other_ranks() {
        let (mut facts, members) = (RankFacts::new(2), members(2));
        for batch_of_rank_0 in [batch(&[("a", "1")]), batch(&[("b", "1")])] {
            assert!(facts.hear(0, batch_of_rank_0, &members).unwrap().is_none());
        }
        assert!(facts.hear(1, batch(&[("a", "1")]), &members).unwrap().is_some() && facts.is_first());
        assert!(facts.hear(1, batch(&[("b", "2")]), &members).is_err());
    }

    #[test]
    fn facts_are_compared_with_the_checkpoint() {
        let kept = [(fact::DTYPE, "Float"), ("config.json rope_theta", "1.0"), (fact::WEIGHTS, "w")];
        let facts = kept.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        let then = Then { fingerprint: Fingerprint { facts, ..Fingerprint::default() }, step: 4 };
        assert_eq!(then.check(&batch(&kept[..2]), true), Ok(vec![]));
        assert_eq!(then.check(&batch(&kept[2..]), false), Ok(vec![]));
        let fault = then.check(&batch(&kept[..1]), true).unwrap_err();
        assert_eq!(fault.message, "cannot resume: config.json rope_theta was 1.0 and is now absent");
        assert!(then.check(&batch(&[(fact::WEIGHTS, "v")]), false).is_err());
        assert!(then.check(&batch(&[(fact::STEP, "4")]), false).is_ok());
        assert!(then.check(&batch(&[(fact::STEP, "3")]), false).is_err());
        // A checkpoint without facts.
        assert!(Then { step: 4, ..Then::default() }.check(&batch(&kept), true).is_ok());
    }
}

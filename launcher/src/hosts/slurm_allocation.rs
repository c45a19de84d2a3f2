//! The Slurm allocation that the launcher runs in, from Slurm's environment variables.

use dyad_proto::Fault;

use crate::hosts::slurm_nodelist::expand;

/// Nodes of a Slurm job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Names, in Slurm's order.
    pub nodes: Vec<String>,
}

impl Allocation {
    /// The allocation of this process; `None` outside a job.
    pub fn here() -> Result<Option<Self>, Fault> {
        Self::of(|name| std::env::var(name).ok())
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Fault> {
        let Some(list) = variable("SLURM_JOB_ID").and(variable("SLURM_JOB_NODELIST")) else {
            return Ok(None);
        };
        let number = |name: &str| variable(name).and_then(|text| text.parse::<u64>().ok());
        // In a step with several tasks, each task would start its own run.
        if number("SLURM_STEP_ID").is_some() && number("SLURM_STEP_NUM_TASKS").is_some_and(|tasks| tasks > 1)
        {
            return Err(Fault::input("srun started the launcher once per task").hint(
                "start it once, in the batch script or the shell of salloc; it reaches the nodes by itself",
            ));
        }
        Ok(Some(Self { nodes: expand(&list)? }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(set: &[(&str, &str)]) -> Result<Option<Allocation>, Fault> {
        Allocation::of(|name| {
            set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn allocation_is_read_from_slurm_variables() {
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&[("SLURM_JOB_NODELIST", "n1")]), Ok(None));
        let job = [("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "n[1-2]")];
        assert_eq!(of(&job), Ok(Some(Allocation { nodes: vec!["n1".into(), "n2".into()] })));
        let step = [("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "2")];
        assert!(of(&[job, step].concat()).unwrap_err().message.contains("once per task"));
        assert!(of(&[("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "n[")]).is_err());
    }
}

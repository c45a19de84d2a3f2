//! Whole runs with a real coordinator and scripted trainers, from the join to the last row.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeMap;

use dyad_coordinator::watch::RECENT;
use dyad_proto::manifest::Manifest;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::{Phase, RunEvent};
use support::{Workspace, ids};

fn kinds(events: &[RunEvent]) -> String {
    let kind = |event: &RunEvent| match event.body.as_ref().unwrap() {
        EventBody::Started(_) => "started".to_owned(),
        EventBody::Arrived(arrived) => format!("arrived:{}", arrived.name),
        EventBody::Joined(joined) => format!("joined:{}", joined.rank),
        EventBody::Data(data) => format!("data:{}", data.pairs),
        EventBody::Step(step) => format!("step:{}", step.step),
        EventBody::Evaluation(evaluation) => format!("eval:{}", evaluation.step),
        EventBody::Checkpoint(_) => "checkpoint".to_owned(),
        EventBody::EarlyStopping(stopping) => format!("best:{}", stopping.best_step),
        EventBody::Ended(_) => "ended".to_owned(),
        EventBody::Phase(phase) => format!("{:?}", phase.phase()),
        EventBody::Model(_) => "model".to_owned(),
        EventBody::Reference(scored) => format!("scored:{}", scored.pairs),
        EventBody::Beat(_) | EventBody::Skipped(_) => "unexpected".to_owned(),
    };
    let unordered = |kind: &String| !kind.starts_with(char::is_uppercase);
    events.iter().map(kind).filter(unordered).collect::<Vec<_>>().join(" ")
}

fn column(rows: &[dyad_tests::Row], key: &str) -> Vec<f64> {
    rows.iter().map(|row| row[key].as_f64().unwrap()).collect()
}

/// Nine pairs, of which one is dropped: two steps of four pairs, with evaluations before, between and after them.
#[tokio::test]
async fn one_trainer_trains_every_kept_pair_once() {
    let work = Workspace::new(9, 3, "shuffle = false\nn_evals = 2");
    let coordinator = work.start(&["--world-size", "1"]).await;
    let events = coordinator.watch();
    let log = coordinator.join("node0-cpu", 0).await.run().await;

    let seen: Vec<Vec<u64>> = log.steps.iter().map(|step| ids(&step.pairs)).collect();
    assert_eq!(seen, [vec![0, 1, 2, 4], vec![5, 6, 7, 8]]);
    assert_eq!(log.steps.iter().map(|step| step.global_chosen_tokens).collect::<Vec<_>>(), [80, 40]);
    assert_eq!(log.evaluations, [(0, vec![0, 1, 2]), (1, vec![0, 1, 2]), (2, vec![0, 1, 2])]);
    assert_eq!(log.bootstrap.as_deref(), Some(&b"meet here"[..]));

    let ended = coordinator.end().await;
    assert_eq!((ended.status, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
    let rows = work.rows("metrics.jsonl");
    assert_eq!(column(&rows, "loss"), [7.0 / 4.0, 26.0 / 4.0]);
    assert_eq!(column(&rows, "epoch"), [0.5, 1.0]);
    assert_eq!(column(&rows, "num_tokens"), [160.0, 320.0]);
    assert_eq!(column(&work.rows("eval_metrics.jsonl"), "eval_rewards/accuracies"), [2.0 / 3.0; 3]);

    let events = events.await.unwrap();
    assert_eq!(
        kinds(&events),
        "started arrived:node0-cpu joined:0 data:9 eval:0 step:1 eval:1 step:2 eval:2 checkpoint ended"
    );
    let step = events.iter().find_map(|event| match event.body.as_ref().unwrap() {
        EventBody::Step(step) => Some(&step.values),
        _ => None,
    });
    let row = &rows[0];
    assert_eq!(step.unwrap().len(), row.len());
    assert!(row.iter().all(|(key, value)| step.unwrap()[key] == value.as_f64().unwrap()));
}

#[tokio::test]
async fn more_evaluations_than_steps_are_warned_about() {
    for (n_evals, warned) in [(2, false), (3, true)] {
        let work = Workspace::new(9, 3, &format!("n_evals = {n_evals}"));
        let coordinator = work.start(&["--world-size", "1"]).await;
        coordinator.join("node0-cpu", 0).await.run().await;
        let ended = coordinator.end().await;
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let words = "n_evals = 3 is more than the run's 2 steps: an evaluation after every step";
        assert_eq!(ended.stderr.contains(words), warned, "{}", ended.stderr);
    }
}

/// Ranks follow the launch order although the second trainer joins first. The long pair gets a rank of its own.
#[tokio::test]
async fn two_trainers_share_each_batch_by_tokens() {
    let work = Workspace::new(9, 3, "shuffle = false\nn_epochs = 2\nn_checkpoints = 2\nn_evals = 1");
    let coordinator = work.start(&["--world-size", "2"]).await;
    let second = coordinator.join("node1-cpu", 1).await;
    let first = coordinator.join("node0-cpu", 0).await;
    let (first, second) = tokio::join!(first.run(), second.run());

    let shares = |log: &support::Log| log.steps.iter().map(|step| ids(&step.pairs)).collect::<Vec<_>>();
    assert_eq!(shares(&first), [vec![0], vec![5, 7], vec![0], vec![5, 7]]);
    assert_eq!(shares(&second), [vec![1, 2, 4], vec![6, 8], vec![1, 2, 4], vec![6, 8]]);
    let checkpoints: Vec<bool> = second.steps.iter().map(|step| step.checkpoint).collect();
    assert_eq!(checkpoints, [false, true, false, false]);
    assert!(second.steps.iter().all(|step| step.global_pairs == 4));
    assert_eq!(first.evaluations, [(0, vec![0]), (4, vec![0])]);
    assert_eq!(second.evaluations, [(0, vec![1, 2]), (4, vec![1, 2])]);
    assert_eq!(second.bootstrap.as_deref(), Some(&b"meet here"[..]));
    assert_eq!(first.plan, second.plan);

    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let rows = work.rows("metrics.jsonl");
    // Rank 0 has one pair with loss 0, rank 1 three with mean loss 7/3: a mean of means would be 7/6, not 7/4.
    assert_eq!(column(&rows, "loss"), [1.75, 6.5, 1.75, 6.5]);
    assert_eq!(column(&rows, "rewards/margins"), [1.0; 4]);
    assert_eq!(column(&rows, "kl"), [0.1; 4]);
    assert_eq!(column(&rows, "step_seconds"), [1.0; 4]);
    assert_eq!(column(&rows, "pairs_per_second"), [4.0; 4]);
}

/// 1100 pairs are three chunks: ids 0..512 and 1024..1100 for rank 0, the others for rank 1.
#[tokio::test]
async fn measuring_goes_round_robin_in_chunks() {
    let work = Workspace::new(1100, 0, "max_steps = 1");
    let coordinator = work.start(&["--world-size", "2"]).await;
    let first = coordinator.join("a", 0).await;
    let second = coordinator.join("b", 1).await;
    let (first, second) = tokio::join!(first.run(), second.run());
    assert_eq!(first.measured, (0..512).chain(1024..1100).collect::<Vec<_>>());
    assert_eq!(second.measured, (512..1024).collect::<Vec<_>>());
    assert_eq!(coordinator.end().await.status, Some(0));
}

#[tokio::test]
async fn fine_tuning_rows_have_no_preference_keys() {
    let work = Workspace::new(4, 2, "training_method = \"sft\"\nn_evals = 1");
    let coordinator = work.start(&["--world-size", "1"]).await;
    coordinator.join("a", 0).await.run().await;
    assert_eq!(coordinator.end().await.status, Some(0));
    let rows = work.rows("metrics.jsonl");
    // The simulated trainer reports losses of pairs too; a real one has none in fine-tuning.
    assert_eq!(column(&rows, "loss"), [3.0 / 3.0 + 30.0 / 30.0]);
    let keys: Vec<&str> = rows[0].keys().map(String::as_str).collect();
    let expected = "step epoch loss grad_norm learning_rate logps/chosen logits/chosen entropy mean_token_accuracy \
                    num_tokens step_seconds tokens_per_second pairs_per_second peak_memory_bytes";
    assert_eq!(keys.join(" "), expected);
    let evaluation = work.rows("eval_metrics.jsonl").remove(0);
    let keys: Vec<&str> = evaluation.keys().map(String::as_str).collect();
    assert_eq!(
        keys.join(" "),
        "step eval_loss eval_logps/chosen eval_logits/chosen eval_entropy eval_mean_token_accuracy eval_seconds"
    );
}

/// The first run dies after step 3 with a checkpoint of step 2; the second starts at step 3, with the same pairs.
#[tokio::test]
async fn resume_repeats_the_lost_steps_and_no_others() {
    let work = Workspace::new(17, 2, "n_checkpoints = 2\nn_evals = 2");
    let coordinator = work.start(&["--world-size", "1"]).await;
    let mut trainer = coordinator.join("a", 0).await;
    trainer.train_until(3).await;
    coordinator.recorded(3).await;
    let whole = std::mem::take(&mut trainer.log);
    drop(trainer);
    assert_eq!(coordinator.end().await.status, Some(1));
    assert!(whole.steps[1].checkpoint && whole.steps.len() >= 3);
    let checkpoint = work.path("out/checkpoint-2");
    std::fs::create_dir(&checkpoint).unwrap();
    let sha256 = whole.plan.unwrap().dataset_sha256;
    let state = serde_json::json!({
        "step": 2, "total_steps": 4, "dataset_sha256": sha256, "random_seed": 42, "batch_size": 4, "world_size": 1,
    });
    std::fs::write(checkpoint.join("dyad_state.json"), state.to_string()).unwrap();
    std::fs::write(checkpoint.join("optimizer.safetensors"), "moments").unwrap();
    Manifest::of(&checkpoint, &BTreeMap::new()).unwrap().write(&checkpoint).unwrap();

    let coordinator = work.start(&["--world-size", "2", "--resume"]).await;
    let (first, second) = (coordinator.join("a", 0).await, coordinator.join("b", 1).await);
    let (first, second) = tokio::join!(first.run(), second.run());
    assert_eq!(coordinator.end().await.status, Some(0));
    let plan = first.plan.unwrap();
    assert_eq!((plan.start_step, plan.total_steps), (2, 4));
    assert_eq!(plan.resume_from, checkpoint.display().to_string());
    assert_eq!(first.steps.iter().map(|step| step.step).collect::<Vec<_>>(), [3, 4]);
    let mut again = [ids(&first.steps[0].pairs), ids(&second.steps[0].pairs)].concat();
    let mut before = ids(&whole.steps[2].pairs);
    again.sort_unstable();
    before.sort_unstable();
    assert_eq!(again, before);
    let rows = work.rows("metrics.jsonl");
    assert_eq!(column(&rows, "step"), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(column(&rows, "num_tokens"), [160.0, 320.0, 480.0, 640.0]);
    assert_eq!(column(&work.rows("eval_metrics.jsonl"), "step"), [0.0, 2.0, 4.0]);
}

/// Watchers get each phase once, in order, when the slowest trainer reaches it.
#[tokio::test]
async fn watchers_get_every_phase_once() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&["--world-size", "1"]).await;
    let events = coordinator.watch();
    let trainer = coordinator.join("a", 0).await;
    for phase in [Phase::Loading, Phase::Loading, Phase::Measuring, Phase::Rendezvous, Phase::Evaluating] {
        trainer.heartbeat(phase, 0);
    }
    trainer.run().await;
    assert_eq!(coordinator.end().await.status, Some(0));
    let phases: Vec<Phase> = events
        .await
        .unwrap()
        .iter()
        .filter_map(|event| match event.body.as_ref().unwrap() {
            EventBody::Phase(phase) => Some(phase.phase()),
            _ => None,
        })
        .collect();
    assert_eq!(phases, [Phase::Loading, Phase::Measuring, Phase::Rendezvous, Phase::Training]);
}

/// With many trainers, every pair of every step goes to exactly one of them.
#[tokio::test]
async fn two_hundred_trainers_share_every_step() {
    let work = Workspace::new(900, 0, "n_epochs = 1\nmax_steps = 3");
    let config = std::fs::read_to_string(work.path("run.toml")).unwrap();
    std::fs::write(work.path("run.toml"), config.replace("batch_size = 4", "batch_size = 300")).unwrap();
    let coordinator = work.start(&["--world-size", "200"]).await;
    let mut runs = Vec::new();
    for index in 0..200 {
        runs.push(tokio::spawn(coordinator.join(&format!("t{index}"), index).await.run()));
    }
    let mut logs = Vec::new();
    for run in runs {
        logs.push(run.await.unwrap());
    }
    assert_eq!(coordinator.end().await.status, Some(0));
    let mut measured: Vec<u64> = logs.iter().flat_map(|log| log.measured.clone()).collect();
    measured.sort_unstable();
    assert_eq!(measured, (0..900).collect::<Vec<_>>());
    let mut seen: Vec<u64> =
        logs.iter().flat_map(|log| &log.steps).flat_map(|step| ids(&step.pairs)).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..900).filter(|id| *id != 3).collect::<Vec<_>>());
    assert_eq!(column(&work.rows("metrics.jsonl"), "step"), [1.0, 2.0, 3.0]);
}

/// The coordinator keeps a limited number of steps in memory; earlier ones come from the metrics files.
#[tokio::test]
async fn a_late_watcher_of_a_long_run_gets_every_step() {
    let steps = RECENT as u64 + 500;
    let work = Workspace::new(8, 0, &format!("max_steps = {}", steps + 1000));
    let coordinator = work.start(&["--world-size", "1"]).await;
    let mut trainer = coordinator.join("node0-cpu", 0).await;
    trainer.train_until(steps).await;
    coordinator.recorded(steps).await;
    let late = coordinator.watched().await;
    drop(trainer);
    let events = late.await.unwrap();
    let count = |is: fn(&EventBody) -> bool| {
        events.iter().filter(|event| event.body.as_ref().is_some_and(is)).count()
    };
    assert_eq!(
        count(|body| matches!(body, EventBody::Started(_) | EventBody::Joined(_) | EventBody::Data(_))),
        3
    );
    let seen: Vec<(u64, Option<f64>)> = events
        .iter()
        .filter_map(|event| match &event.body {
            Some(EventBody::Step(step)) => Some((step.step, step.values.get("loss").copied())),
            _ => None,
        })
        .collect();
    let rows = work.rows("metrics.jsonl");
    assert!(rows.len() > RECENT, "{}", rows.len());
    let losses = column(&rows, "loss").into_iter().map(Some);
    assert_eq!(seen, (1..=rows.len() as u64).zip(losses).collect::<Vec<_>>());
    assert_eq!(count(|body| matches!(body, EventBody::Skipped(_))), 0);
    coordinator.end().await;
}

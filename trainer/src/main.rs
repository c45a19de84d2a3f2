//! Entry point of the trainer: command line in, exit status out.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

mod allocator;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use dyad_data::new_model;
use dyad_data::tokenizer::ChatTokenizer;
use dyad_proto::preference::Message;
use dyad_proto::{Fault, RunConfig, files, pair_file, plain};
use dyad_telemetry::{LogFormat, Logs, Telemetry};
use trainer::cli::{Cli, Command, GenerateOptions, RunOptions};
use trainer::generate::prompt;
use trainer::session::Identity;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    dyad_proto::signals::ignore_size_limit();
    let format = match &command {
        Command::Run(options) => options.log_format,
        Command::NewModel(_) | Command::Generate(_) => LogFormat::Text,
    };
    // Held until the exit status is known: what happened last leaves the process too.
    let _telemetry = Telemetry::start("trainer", Logs { format, variable: "DYAD_LOG", default: "info" });
    trainer::panics::silence();
    let result = match command {
        Command::Run(options) => run(options),
        Command::NewModel(command) => new_model::create_stored(&command.model, &command.storage),
        Command::Generate(options) => generate(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            dyad_telemetry::last_words(&fault);
            ExitCode::from(fault.code.exit_status())
        }
    }
}

fn use_threads(threads: Option<usize>) {
    if let Some(threads) = threads {
        tch::set_num_threads(threads.max(1) as i32);
    }
}

fn run(options: RunOptions) -> Result<(), Fault> {
    files::enough_may_be_open()?;
    use_threads(options.threads);
    let identity = Identity {
        coordinator: options.coordinator,
        tls_dir: options.tls_dir,
        token_file: options.token_file,
        name: options.name,
        launch_index: options.launch_index,
        device: options.device,
        connect_timeout: std::time::Duration::from_secs(options.connect_timeout),
    };
    trainer::run::run(&identity, options.profile)
}

fn generate(options: &GenerateOptions) -> Result<(), Fault> {
    use_threads(options.threads);
    let pairs = pair_file::pairs("--pairs", &options.pairs)?;
    let (lines, conversations): (Vec<u64>, Vec<_>) =
        pairs.into_iter().take(options.limit).map(|(line, pair)| (line, pair.messages)).unzip();
    let (model, base) = trainer::run::load_for_inference(&options.model)?;
    let mut config = RunConfig { template_date: options.template_date.clone(), ..RunConfig::default() };
    config.fill_template_date();
    // An adapter's folder need not have one.
    let own = options.model.join("tokenizer.json").is_file();
    let folder = if own { &options.model } else { &base };
    let tokenizer = ChatTokenizer::load(folder, &base, config.template_date()?)?;
    let prompt = |(conversation, line): (&Vec<Message>, u64)| {
        prompt(&tokenizer, conversation, &model).map_err(|fault| {
            let place = format!("{} line {line}", options.pairs.display());
            Fault { message: format!("{place}: {}", fault.message), ..fault }
        })
    };
    let answers = trainer::panics::caught(|| {
        let prompts = conversations.iter().zip(lines).map(prompt).collect::<Result<_, _>>()?;
        trainer::generate::complete(&model, &tokenizer, prompts, options.max_new_tokens)
    })?;
    let mut out = std::io::stdout().lock();
    for (conversation, completion) in conversations.iter().zip(answers) {
        let prompt = conversation.last().map(|message| message.content.as_str()).unwrap_or_default();
        let line = serde_json::json!({ "prompt": prompt, "completion": completion }).to_string();
        writeln!(out, "{}", plain::json(&line))
            .map_err(|error| Fault::failed(format!("cannot write to standard output: {error}")))?;
    }
    Ok(())
}

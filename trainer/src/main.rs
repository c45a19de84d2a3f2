//! Entry point of the trainer: command line in, exit status out.
// Tests may read files directly; all other code goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

mod allocator;

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;

use dyad_data::new_model;
use dyad_data::tokenizer::ChatTokenizer;
use dyad_proto::pairs::wanted::Wanted;
use dyad_proto::pairs::{Content, Conversation, Message, Role};
use dyad_proto::run_config::DataFile;
use dyad_proto::{Fault, RunConfig, files, plain};
use dyad_sources::open;
use dyad_telemetry::{LogFormat, Logs, Telemetry};
use trainer::cli::{CheckOptions, GenerateOptions, TrainerCli, TrainerCommand, TrainerOptions};
use trainer::generate::{Prompt, prompt};
use trainer::session::Identity;

/// Most bytes of a prompt from standard input: far more than a model reads.
const MOST_PROMPT: u64 = 16 << 20;

fn main() -> ExitCode {
    let command = dyad_telemetry::command_line::<TrainerCli>().command;
    dyad_proto::signals::ignore_size_limit();
    let format = match &command {
        TrainerCommand::Run(options) => options.log_format,
        TrainerCommand::Check(options) => options.log_format,
        TrainerCommand::NewModel(_) | TrainerCommand::Generate(_) => LogFormat::Text,
    };
    // Dropped last, so that the final events are exported too.
    let _telemetry = Telemetry::start("trainer", Logs { format, variable: "DYAD_LOG", default: "info" });
    dyad_torch::panics::silence();
    let result = match command {
        TrainerCommand::Run(options) => run(options),
        TrainerCommand::NewModel(command) => new_model::create_stored(&command.model, &command.storage),
        TrainerCommand::Check(options) => look(&options),
        TrainerCommand::Generate(options) => generate(&options),
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

fn run(options: TrainerOptions) -> Result<(), Fault> {
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

fn look(options: &CheckOptions) -> Result<(), Fault> {
    let found = match (&options.model, &options.config) {
        (Some(name), _) => serde_json::to_value(trainer::check::model(name)?),
        (None, Some(path)) => {
            let mut config = match path.as_os_str() == "-" {
                true => {
                    let text = std::io::read_to_string(std::io::stdin().lock())
                        .map_err(|error| Fault::input(format!("cannot read standard input: {error}")))?;
                    RunConfig::from_json(&text)?
                }
                false => RunConfig::load(path, &[])?,
            };
            config.fill_template_date();
            serde_json::to_value(dyad_torch::panics::caught(|| trainer::check::run(&config))?)
        }
        (None, None) => return Err(Fault::input("nothing to look at").hint("give --config or --model")),
    };
    let found = found.map_err(|error| Fault::failed(error.to_string()))?;
    writeln!(std::io::stdout().lock(), "{}", plain::json(&found.to_string()))
        .map_err(|error| Fault::failed(format!("cannot write to standard output: {error}")))
}

/// A conversation to answer.
struct Asked {
    prompt: Prompt,
    /// Where the prompt comes from, for error messages.
    place: String,
}

fn conversations(options: &GenerateOptions) -> Result<Vec<Asked>, Fault> {
    if !options.pairs.is_empty() {
        let place = |path: &String| DataFile { path: path.clone(), weight: None };
        let places = options.pairs.iter().map(place).collect::<Vec<_>>().into();
        let source = open::pairs("--pairs", &places, Wanted::default())?;
        let asked = |id| {
            let prompt = match source.pair(id)?.content {
                Content::Conversation(pair) => Prompt::Messages(asked_messages(pair)),
                Content::Text(pair) => Prompt::Text(pair.prompt.unwrap_or_default()),
            };
            Ok(Asked { prompt, place: source.place(id) })
        };
        return (0..source.len().min(options.limit) as u64).map(asked).collect();
    }
    let alone = ["-".to_owned()];
    let prompts = if options.prompt.is_empty() { &alone[..] } else { &options.prompt };
    let asked = |(index, prompt): (usize, &String)| {
        let content = if prompt == "-" { standard_input()? } else { prompt.clone() };
        let place = format!("prompt {}", index + 1);
        if content.trim().is_empty() {
            return Err(Fault::input(format!("{place} is empty"))
                .hint("give --prompt TEXT or --pairs FILE, or write a prompt to standard input"));
        }
        Ok(Asked { prompt: Prompt::Messages(vec![Message::new(Role::User, content)]), place })
    };
    prompts.iter().enumerate().map(asked).collect()
}

/// The messages to answer: the prompt, or a whole conversation up to the assistant's last message.
fn asked_messages(said: Conversation) -> Vec<Message> {
    if !said.prompt.is_empty() {
        return said.prompt;
    }
    let mut messages = said.chosen;
    let last = messages.iter().rposition(|message| message.role == Role::Assistant);
    messages.truncate(last.unwrap_or(messages.len()));
    messages
}

/// Reads one prompt, without the line end that an editor or `echo` appends.
fn standard_input() -> Result<String, Fault> {
    let cannot = |error: std::io::Error| Fault::input(format!("cannot read standard input: {error}"));
    if std::io::stdin().is_terminal() {
        dyad_telemetry::voice::stderr().line("write a prompt, then press Ctrl-D");
    }
    let mut text = String::new();
    std::io::stdin().lock().take(MOST_PROMPT + 1).read_to_string(&mut text).map_err(cannot)?;
    if text.len() as u64 > MOST_PROMPT {
        return Err(Fault::input(format!("the prompt on standard input is longer than {MOST_PROMPT} bytes"))
            .hint("no model reads that much: give the part that matters"));
    }
    text.truncate(text.trim_end_matches(['\n', '\r']).len());
    Ok(text)
}

fn generate(options: &GenerateOptions) -> Result<(), Fault> {
    use_threads(options.threads);
    let asked = conversations(options)?;
    let (model, base) = trainer::run::load_for_inference(&options.model)?;
    let mut config = RunConfig { template_date: options.template_date.clone(), ..RunConfig::default() };
    config.fill_template_date();
    // An adapter's folder may have no tokenizer.
    let own = dyad_data::files::is_there(&options.model.join("tokenizer.json"));
    let folder = if own { &options.model } else { &base };
    let tokenizer = ChatTokenizer::load(folder, &base, config.template_date()?)?;
    let prompt = |asked: &Asked| {
        prompt(&tokenizer, &asked.prompt, &model)
            .map_err(|fault| Fault { message: format!("{}: {}", asked.place, fault.message), ..fault })
    };
    let answers = dyad_torch::panics::caught(|| {
        let prompts = asked.iter().map(prompt).collect::<Result<_, _>>()?;
        trainer::generate::complete(&model, &tokenizer, prompts, options.max_new_tokens)
    })?;
    let mut out = std::io::stdout().lock();
    for (asked, completion) in asked.iter().zip(answers) {
        let prompt = match &asked.prompt {
            Prompt::Messages(messages) => messages.last().map_or_else(String::new, Message::text),
            Prompt::Text(text) => text.clone(),
        };
        let line = serde_json::json!({ "prompt": prompt, "completion": completion }).to_string();
        writeln!(out, "{}", plain::json(&line))
            .map_err(|error| Fault::failed(format!("cannot write to standard output: {error}")))?;
    }
    Ok(())
}

//! The agent's main loop: sends its greeting, carries out requests, and kills its processes when the launcher is gone.

use std::cell::RefCell;
use std::collections::HashMap;
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use clap::Args;
use dyad_proto::ownership::Ownership;
use dyad_proto::security::{Proof, TLS_DIR, TOKEN_FILE};
use dyad_proto::{Fault, RunConfig};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::agent::facts::MachineFacts;
use crate::agent::machine::Hello;
use crate::agent::ports::{open, reach};
use crate::agent::protocol::{Answer, Prepare, Question, Reply, Request, StartProgram, decode, encode};
use crate::agent::run_files;
use crate::process::end::LINES;
use crate::process::os::{die_with_me, each_line, hand_over, keep_to, raw_status};
use crate::process::programs::program;
use crate::security::secret_folder::SecretFolder;

/// Options of `launcher agent`.
#[derive(Args, Clone, Debug)]
pub struct AgentOptions {
    /// End, and kill all started processes, if the launcher sends nothing for this long.
    #[arg(long, default_value_t = 20, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub silence: u64,
}

/// Serves a launcher on standard input and output until it is gone, then exits the process. Returns only errors.
pub async fn serve(options: &AgentOptions) -> Result<(), Fault> {
    outlive_signals()?;
    let silence = Duration::from_secs(options.silence);
    LocalSet::new().run_until(obey(silence)).await;
    // Exit: the blocked read of standard input cannot be cancelled. Processes that are left die with this one.
    std::process::exit(0)
}

/// Ignores the signals by which a scheduler ends a job: it signals all processes, and the agent must live until the checkpoint is written.
fn outlive_signals() -> Result<(), Fault> {
    for kind in
        [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup(), SignalKind::user_defined1()]
    {
        // The handler stays installed after the drop.
        let _ = signal(kind).map_err(|error| Fault::failed(format!("cannot listen for signals: {error}")))?;
    }
    Ok(())
}

async fn obey(silence: Duration) {
    let (say, said) = mpsc::unbounded_channel();
    let (news, lines) = mpsc::channel(LINES);
    let mut agent = ServingAgent {
        say,
        news,
        processes: Rc::default(),
        listener: None,
        keys: None,
        owner: Rc::default(),
    };
    agent.say(&Reply::Hello(Box::new(Hello::of_this_machine())));
    tokio::select! {
        () = agent.listen_to(silence) => {}
        // LNC-A1: standard output is closed.
        () = write(said, lines) => {}
    }
    agent.kill_all();
    drop(agent.owner.borrow_mut().take());
}

/// Writes messages to standard output, answers before process output. Returns if a write fails.
async fn write(mut said: mpsc::UnboundedReceiver<String>, mut lines: mpsc::Receiver<String>) {
    let mut stdout = tokio::io::stdout();
    loop {
        let line = tokio::select! {
            biased;
            Some(line) = said.recv() => line,
            Some(line) = lines.recv() => line,
            else => return,
        };
        let written = stdout.write_all(line.as_bytes()).await;
        if written.is_err() || stdout.flush().await.is_err() {
            return;
        }
    }
}

struct ServingAgent {
    say: mpsc::UnboundedSender<String>,
    /// Lines and ends of processes, in order. Bounded: a process that writes faster than the launcher reads is blocked.
    news: mpsc::Sender<String>,
    /// Pid of each running process.
    processes: Rc<RefCell<HashMap<u64, i32>>>,
    listener: Option<tokio::task::JoinHandle<()>>,
    /// Private folder with the credentials of this host's processes; removed when the agent ends.
    keys: Option<SecretFolder>,
    /// Lock of the output folder if the coordinator runs here; released when the agent ends.
    owner: Rc<RefCell<Option<Ownership>>>,
}

impl ServingAgent {
    fn say(&self, reply: &Reply) {
        // Fails only when the process is about to end.
        let _ = self.say.send(encode(reply));
    }

    /// Carries out requests until standard input closes or stays silent for `silence`.
    async fn listen_to(&mut self, silence: Duration) {
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        while let Ok(Ok(Some(line))) = tokio::time::timeout(silence, lines.next_line()).await {
            if let Some(request) = decode(&line) {
                self.obey(request);
            }
        }
    }

    fn obey(&mut self, request: Request) {
        match request {
            Request::Ping => self.say(&Reply::Pong),
            Request::Signal { process, signal } => self.signal(process, signal),
            Request::Start(start) => {
                let process = start.process;
                if let Err(fault) = self.start(&start) {
                    self.say(&Reply::Unstarted { process, trouble: fault.into() });
                }
            }
            Request::Ask { ask, question } => self.ask(ask, question),
        }
    }

    fn start(&self, start: &StartProgram) -> Result<(), Fault> {
        let path = program(&start.program)?;
        let mut command = Command::new(&path);
        // TLS folder and token file in this host's own environment are not meant for this run.
        command.env_remove(TLS_DIR).env_remove(TOKEN_FILE);
        command.args(&start.args).envs(start.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if start.program == "coordinator" {
            self.owner.borrow().iter().for_each(|owner| hand_over(&mut command, owner));
        }
        keep_to(&mut command, &start.cores);
        die_with_me(&mut command);
        let child = command
            .spawn()
            .map_err(|error| Fault::failed(format!("cannot start {}: {error}", path.display())))?;
        if let Some(pid) = child.id() {
            self.processes.borrow_mut().insert(start.process, pid as i32);
        }
        let (news, processes, process) = (self.news.clone(), Rc::clone(&self.processes), start.process);
        tokio::task::spawn_local(async move {
            // Once it is reaped, the kernel may give its id to another process.
            let reaped = || {
                processes.borrow_mut().remove(&process);
            };
            let status = watch(child, process, &news, reaped).await;
            let _ = news.send(encode(&Reply::Ended { process, status })).await;
        });
        Ok(())
    }

    #[expect(unsafe_code, reason = "kill")]
    fn signal(&self, process: u64, signal: i32) {
        if let Some(&pid) = self.processes.borrow().get(&process) {
            // SAFETY: a system call without pointers.
            unsafe { libc::kill(pid, signal) };
        }
    }

    fn keep(&mut self, process: &str, proof: &Proof) -> Result<Answer, Fault> {
        let keys = match self.keys.take() {
            Some(keys) => keys,
            None => SecretFolder::create()?,
        };
        let written = keys.write(process, proof);
        self.keys = Some(keys);
        Ok(Answer::Written(written?.display().to_string()))
    }

    fn kill_all(&self) {
        let all: Vec<u64> = self.processes.borrow().keys().copied().collect();
        all.into_iter().for_each(|process| self.signal(process, libc::SIGKILL));
    }

    fn ask(&mut self, ask: u64, question: Question) {
        match question {
            Question::Keep { process, proof } => {
                let kept = self.keep(&process, &proof);
                self.say(&reply(ask, kept));
            }
            Question::Listen => self.open_port(ask),
            Question::StopListening => self.close_port(ask),
            Question::Reach { addresses } => {
                self.later(ask, async move { Ok(Answer::Reached(reach(&addresses).await)) });
            }
            Question::Prepare(prepare) => self.prepare(ask, prepare),
            Question::Examine(examine) => {
                self.later(
                    ask,
                    blocking(move || Ok(Answer::Examined(Box::new(MachineFacts::here(&examine))))),
                );
            }
        }
    }

    fn prepare(&self, ask: u64, prepare: Prepare) {
        // After a repeated request the agent already holds the lock.
        let (owner, owned) = (Rc::clone(&self.owner), self.owner.borrow().is_some());
        self.later(ask, async move {
            let (answer, taken) = blocking(move || prepared(&prepare, owned)).await?;
            if taken.is_some() {
                *owner.borrow_mut() = taken;
            }
            Ok(answer)
        });
    }

    fn later(&self, ask: u64, answer: impl Future<Output = Result<Answer, Fault>> + 'static) {
        let say = self.say.clone();
        tokio::task::spawn_local(async move {
            let _ = say.send(encode(&reply(ask, answer.await)));
        });
    }

    /// Closes the test port, so that it is not open during the run.
    fn close_port(&mut self, ask: u64) {
        let (before, say) = (self.listener.take(), self.say.clone());
        tokio::task::spawn_local(async move {
            if let Some(before) = before {
                before.abort();
                // The task owns the socket and closes it when it ends.
                let _ = before.await;
            }
            let _ = say.send(encode(&reply(ask, Ok(Answer::Done))));
        });
    }

    /// Opens a port and closes the previous one. Peers only connect to it.
    fn open_port(&mut self, ask: u64) {
        let say = self.say.clone();
        let task = tokio::task::spawn_local(async move {
            match open().await {
                Ok((listener, port)) => {
                    let _ = say.send(encode(&reply(ask, Ok(Answer::Listening(port)))));
                    while listener.accept().await.is_ok() {}
                }
                Err(fault) => drop(say.send(encode(&reply(ask, Err(fault))))),
            }
        });
        if let Some(before) = self.listener.replace(task) {
            before.abort();
        }
    }
}

/// Forwards a process's lines until it has ended and all are read; a process that it started may keep them open. Calls `reaped` as
/// soon as it has ended. Returns its status as wait(2) does.
async fn watch(mut child: Child, process: u64, news: &mpsc::Sender<String>, reaped: impl FnOnce()) -> i32 {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (_, _, status) =
        tokio::join!(pass_on(stdout, process, true, news), pass_on(stderr, process, false, news), async {
            let status = child.wait().await;
            reaped();
            status
        });
    raw_status(status)
}

async fn pass_on<R: AsyncRead + Unpin>(
    stream: Option<R>,
    process: u64,
    stdout: bool,
    news: &mpsc::Sender<String>,
) {
    let Some(stream) = stream else { return };
    each_line(stream, news, |text| encode(&Reply::Line { process, stdout, text })).await;
}

/// Runs slow work (files, drivers) on another thread: an agent that does not answer pings meanwhile would count as lost.
async fn blocking<T: Send + 'static>(
    look: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let looked = tokio::task::spawn_blocking(look).await;
    looked.unwrap_or_else(|error| Err(Fault::failed(format!("the agent could not look: {error}"))))
}

fn reply(ask: u64, answer: Result<Answer, Fault>) -> Reply {
    Reply::Answer { ask, answer: answer.unwrap_or_else(|fault| Answer::Failed(fault.into())) }
}

fn prepared(prepare: &Prepare, owned: bool) -> Result<(Answer, Option<Ownership>), Fault> {
    let config = RunConfig::from_json(&prepare.config_json)?;
    if !prepare.coordinator {
        run_files::look(&config, false, prepare.fresh)?;
        return Ok((Answer::Done, None));
    }
    let owner = match owned {
        true => run_files::look(&config, true, prepare.fresh).map(|()| None)?,
        false => Some(run_files::take(&config, prepare.fresh)?),
    };
    Ok((Answer::Written(run_files::write_config(&config)?.display().to_string()), owner))
}

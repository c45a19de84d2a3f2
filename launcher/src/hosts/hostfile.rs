//! Parser of `--hosts a,b` and of hostfiles in the format of OpenMPI, DeepSpeed and MPICH. Pure, except for reading the file.

use std::fmt;
use std::path::Path;

use dyad_proto::{Fault, agrees, counted};

/// Name and ssh address of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Name in messages, logs and names of trainers; unique in a run.
    pub name: String,
    /// Host name or IP address that ssh connects to.
    pub address: String,
    /// User on the host; `None` for ssh's default.
    pub user: Option<String>,
    /// Port of sshd; `None` for ssh's default.
    pub port: Option<u16>,
    /// Number of trainers; `None` if the file does not set it.
    pub slots: Option<u32>,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Host {
    /// A host with only a name.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { name: name.into(), address: name.into(), user: None, port: None, slots: None }
    }

    /// Parses `[user@]host[:port]`; an IPv6 address with a port needs brackets.
    fn parse(text: &str) -> Result<Self, String> {
        let (user, rest) = match text.rsplit_once('@') {
            Some(("", _)) => return Err(format!("\"{text}\" has no user before the @")),
            Some((user, rest)) => (Some(user.to_owned()), rest),
            None => (None, text),
        };
        let (address, port) = split_port(rest)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-:%".contains(c);
        if address.is_empty() || address.starts_with('-') || !address.chars().all(plain) {
            return Err(format!("\"{text}\" is no host"));
        }
        if user
            .as_ref()
            .is_some_and(|user| user.starts_with('-') || !user.chars().all(|c| plain(c) || c == '\\'))
        {
            return Err(format!("\"{text}\" has no user that ssh could take"));
        }
        Ok(Self { name: address.replace([':', '%'], "_"), address: address.into(), user, port, slots: None })
    }
}

fn split_port(text: &str) -> Result<(&str, Option<u16>), String> {
    let port = |text: &str| match text.parse() {
        Ok(0) | Err(_) => Err(format!("\"{text}\" is no port")),
        Ok(port) => Ok(Some(port)),
    };
    if let Some(rest) = text.strip_prefix('[') {
        let (address, rest) =
            rest.split_once(']').ok_or_else(|| format!("\"{text}\" has no closing bracket"))?;
        return match rest.strip_prefix(':') {
            Some(number) => Ok((address, port(number)?)),
            None if rest.is_empty() => Ok((address, None)),
            None => Err(format!("\"{text}\" goes on after the bracket")),
        };
    }
    match text.split_once(':') {
        // More than one colon: an IPv6 address without port.
        Some((_, rest)) if rest.contains(':') => Ok((text, None)),
        Some((address, number)) => Ok((address, port(number)?)),
        None => Ok((text, None)),
    }
}

/// Parses a list such as `a,user@b:2222,c`.
pub fn parse_list(text: &str) -> Result<Vec<Host>, Fault> {
    let mut hosts = Vec::new();
    for (index, item) in text.split(',').map(str::trim).enumerate() {
        let place = format!("--hosts, entry {}", index + 1);
        let host = Host::parse(item).map_err(|why| wrong(&place, &why))?;
        add(&mut hosts, (host, place))?;
    }
    named_apart(hosts)
}

/// Size limit of a hostfile in bytes; enough for a million hosts.
const MOST_BYTES: u64 = 64 << 20;

/// Reads a hostfile or a pipe (`<(scontrol show hostnames)`).
pub fn read(path: &Path) -> Result<Vec<Host>, Fault> {
    let text = dyad_proto::files::read_to_string_or_pipe(path, MOST_BYTES).map_err(|error| {
        Fault::input(format!("cannot read hostfile {}: {error}", path.display())).hint(FORM)
    })?;
    parse(&path.display().to_string(), &text)
}

/// Parses a hostfile. A line has a host, then optionally `slots=N`; `#` starts a comment.
pub fn parse(file: &str, text: &str) -> Result<Vec<Host>, Fault> {
    let mut hosts = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let place = format!("{file}:{}", index + 1);
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(first) = words.next() else { continue };
        let mut host = Host::parse(first).map_err(|why| wrong(&place, &why))?;
        for word in words {
            setting(&mut host, word).map_err(|why| wrong(&place, &why))?;
        }
        add(&mut hosts, (host, place))?;
    }
    if hosts.is_empty() {
        return Err(Fault::input(format!("{file} names no host")).hint(FORM));
    }
    named_apart(hosts)
}

const FORM: &str = "one host a line: [user@]host[:port] [slots=N]; # begins a comment";

fn wrong(place: &str, why: &str) -> Fault {
    Fault::input(format!("{place}: {why}")).hint(FORM)
}

/// Parses `slots=N`. OpenMPI's `max_slots` is accepted and ignored.
fn setting(host: &mut Host, word: &str) -> Result<(), String> {
    let Some((key, value)) = word.split_once('=') else {
        return Err(format!("\"{word}\" is no setting"));
    };
    let number = || match value.parse::<u32>() {
        Ok(number @ 1..=4096) => Ok(number),
        _ => Err(format!("{key} is {value}, not a number from 1 to 4096")),
    };
    match key {
        "slots" if host.slots.is_some() => Err("slots is set twice".into()),
        "slots" => number().map(|slots| host.slots = Some(slots)),
        "max_slots" | "max-slots" => number().map(drop),
        _ => Err(format!("\"{key}\" is no setting")),
    }
}

fn add(hosts: &mut Vec<(Host, String)>, new: (Host, String)) -> Result<(), Fault> {
    let same = |(host, _): &&(Host, String)| {
        (&host.address, host.port, &host.user) == (&new.0.address, new.0.port, &new.0.user)
    };
    if let Some((host, place)) = hosts.iter().find(same) {
        let address = &host.address;
        return Err(Fault::input(format!("{}: host {address} is named twice, first in {place}", new.1))
            .hint("name each host once; slots=N gives it several trainers"));
    }
    hosts.push(new);
    Ok(())
}

/// Makes names unique: hosts with the same address get user and port in their names.
fn named_apart(hosts: Vec<(Host, String)>) -> Result<Vec<Host>, Fault> {
    let mut hosts: Vec<Host> = hosts.into_iter().map(|(host, _)| host).collect();
    for index in 0..hosts.len() {
        let shared = hosts.iter().filter(|host| host.address == hosts[index].address).count() > 1;
        if shared {
            let host = &mut hosts[index];
            let port = host.port.map_or_else(String::new, |port| format!("_{port}"));
            let user = host.user.as_ref().map_or_else(String::new, |user| format!("{user}_"));
            host.name = format!("{user}{}{port}", host.address.replace([':', '%'], "_"));
        }
    }
    Ok(hosts)
}

/// Value of `--nodes`: a number or a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nodes {
    /// Smallest number of nodes.
    pub min: u32,
    /// Largest number of nodes.
    pub max: u32,
}

impl Nodes {
    /// Exactly this many nodes.
    #[must_use]
    pub fn exactly(count: u32) -> Self {
        Self { min: count, max: count }
    }

    /// How many of `given` hosts the run uses; fails if they are too few.
    pub fn of(self, given: u32) -> Result<u32, Fault> {
        if given < self.min {
            let (needed, are) = (counted(self.min, "host"), agrees(given, "is", "are"));
            return Err(Fault::input(format!("--nodes {self} needs {needed}, {given} {are} given"))
                .hint("name more hosts, or lower --nodes"));
        }
        Ok(given.min(self.max))
    }
}

impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max { write!(f, "{}", self.max) } else { write!(f, "{}:{}", self.min, self.max) }
    }
}

impl std::str::FromStr for Nodes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.parse() {
            Ok(number @ 1..=4096) => Ok(number),
            _ => Err("expected N or MIN:MAX, each from 1 to 4096".to_owned()),
        };
        let (min, max) = text.split_once(':').unwrap_or((text, text));
        match (number(min)?, number(max)?) {
            (min, max) if min > max => Err(format!("MIN {min} is above MAX {max}")),
            (min, max) => Ok(Self { min, max }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.name.as_str()).collect()
    }

    #[test]
    fn openmpi_and_deepspeed_files_are_read() {
        let text = "# my cluster\nworker-1 slots=8\n\n  ann@worker-2:2222 slots=4 max_slots=8 # new\n10.0.0.3\n[2001:db8::1]:22\n";
        let hosts = parse("hosts", text).unwrap();
        assert_eq!(names(&hosts), ["worker-1", "worker-2", "10.0.0.3", "2001_db8__1"]);
        assert_eq!((hosts[0].slots, hosts[1].slots, hosts[2].slots), (Some(8), Some(4), None));
        assert_eq!((hosts[1].user.as_deref(), hosts[1].port), (Some("ann"), Some(2222)));
        assert_eq!((hosts[3].address.as_str(), hosts[3].port), ("2001:db8::1", Some(22)));
        assert_eq!(parse_list("2001:db8::1").unwrap()[0].address, "2001:db8::1");
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, message) in [
            ("a\nb slots=0", "hosts:2: slots is 0, not a number from 1 to 4096"),
            ("a slots=x", "hosts:1: slots is x, not a number from 1 to 4096"),
            ("a slots=1 slots=2", "hosts:1: slots is set twice"),
            ("a gpus=8", "hosts:1: \"gpus\" is no setting"),
            ("a 8", "hosts:1: \"8\" is no setting"),
            ("a:0", "hosts:1: \"0\" is no port"),
            ("a:70000", "hosts:1: \"70000\" is no port"),
            ("@a", "hosts:1: \"@a\" has no user before the @"),
            ("-oProxyCommand=x", "hosts:1: \"-oProxyCommand=x\" is no host"),
            ("-x@a", "hosts:1: \"-x@a\" has no user that ssh could take"),
            ("a;b", "hosts:1: \"a;b\" is no host"),
            ("[::1", "hosts:1: \"[::1\" has no closing bracket"),
            ("# a\na\n\na", "hosts:4: host a is named twice, first in hosts:2"),
            ("# nobody\n", "hosts names no host"),
        ] {
            let fault = parse("hosts", text).unwrap_err();
            assert_eq!((fault.message.as_str(), fault.code.exit_status()), (message, 2), "{text}");
        }
        assert_eq!(parse_list("a,,b").unwrap_err().message, "--hosts, entry 2: \"\" is no host");
    }

    #[test]
    fn names_include_the_port_if_an_address_is_listed_twice() {
        assert_eq!(names(&parse_list("h:1,h:2,g").unwrap()), ["h_1", "h_2", "g"]);
    }

    #[test]
    fn nodes_are_a_number_or_a_range() {
        let range: Nodes = "2:4".parse().unwrap();
        assert_eq!((range, range.to_string().as_str()), (Nodes { min: 2, max: 4 }, "2:4"));
        assert_eq!([3, 4, 9].map(|given| range.of(given).unwrap()), [3, 4, 4]);
        assert!(range.of(1).unwrap_err().message.contains("--nodes 2:4 needs 2 hosts, 1 is given"));
        assert_eq!("4".parse(), Ok(Nodes::exactly(4)));
        for wrong in ["0", "4:2", "a", "1:", ":", "1:2:3", "5000"] {
            assert!(wrong.parse::<Nodes>().is_err(), "{wrong}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[ -~\n\t\u{e4}]{0,80}") {
            let _ = parse("hosts", &text);
            let _ = parse_list(&text);
        }
    }
}

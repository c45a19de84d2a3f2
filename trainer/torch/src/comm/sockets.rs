//! Finds the user at the other end of the connections between ranks. The kernel knows the user only for peers on this machine.

use std::collections::HashSet;

/// Inodes of this process's sockets.
pub(super) fn own() -> HashSet<u64> {
    let descriptors = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let inode = |entry: std::fs::DirEntry| {
        let target = std::fs::read_link(entry.path()).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    descriptors.filter_map(inode).collect()
}

/// User id at the other end of a connection opened since `before`, if that is another user of this machine. Gloo does not
/// authenticate its peers: a process that knows a port may connect before the expected rank. Peers on other machines are not checked.
pub(super) fn of_another_user(before: &HashSet<u64>) -> Option<u32> {
    let own: HashSet<u64> = own().difference(before).copied().collect();
    let user = own_user();
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|table| {
        let table: Vec<SocketEntry> =
            dyad_proto::files::of_kernel(table).ok()?.lines().filter_map(SocketEntry::parse).collect();
        stranger(&table, &own, user)
    })
}

#[expect(unsafe_code, reason = "geteuid")]
fn own_user() -> u32 {
    // SAFETY: a plain system call that cannot fail.
    unsafe { libc::geteuid() }
}

/// A line of the kernel's table of connections.
#[derive(Debug, PartialEq, Eq)]
struct SocketEntry {
    local: String,
    remote: String,
    user: u32,
    inode: u64,
}

impl SocketEntry {
    /// Parses a line; `None` unless the connection is established.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().skip(1);
        let (local, remote) = (words.next()?.to_owned(), words.next()?.to_owned());
        if words.next()? != "01" {
            return None;
        }
        let user = words.nth(3)?.parse().ok()?;
        Some(Self { local, remote, user, inode: words.nth(1)?.parse().ok()? })
    }
}

/// User id of the first peer of an own socket that is not `user`.
fn stranger(table: &[SocketEntry], own: &HashSet<u64>, user: u32) -> Option<u32> {
    let mine = |entry: &&SocketEntry| own.contains(&entry.inode);
    let other = |mine: &SocketEntry| {
        table.iter().find(|entry| entry.local == mine.remote && entry.remote == mine.local).map(|e| e.user)
    };
    table.iter().filter(mine).filter_map(other).find(|&other| other != user)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:9C40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 11 1 0 100 0 0 10 0
   1: 0100007F:9C40 0100007F:D431 01 00000000:00000000 00:00000000 00000000  1000        0 12 1 0 20 4 30 10 -1
   2: 0100007F:D431 0100007F:9C40 01 00000000:00000000 00:00000000 00000000 65534        0 13 1 0 20 4 30 10 -1
   3: 0100007F:9C40 0100007F:D432 01 00000000:00000000 00:00000000 00000000  1000        0 14 1 0 20 4 30 10 -1
   4: 0100007F:D432 0100007F:9C40 01 00000000:00000000 00:00000000 00000000  1000        0 15 1 0 20 4 30 10 -1
";

    #[test]
    fn a_connection_of_another_user_is_found() {
        let table: Vec<SocketEntry> = TABLE.lines().filter_map(SocketEntry::parse).collect();
        assert_eq!(table.len(), 4, "only established connections");
        assert_eq!(stranger(&table, &HashSet::from([12, 14]), 1000), Some(65534));
        assert_eq!(stranger(&table, &HashSet::from([14, 15]), 1000), None);
    }

    #[test]
    fn connections_of_the_same_user_are_accepted() {
        let before = own();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _other = listener.accept().unwrap();
        assert!(own().difference(&before).count() >= 3, "other tests may open some, too");
        assert_eq!(of_another_user(&before), None);
    }
}

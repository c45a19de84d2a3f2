//! Waits for the coordinator: in a cluster its name, its host and its port come up in any order.

use std::time::Duration;

use dyad_proto::security::client::root_cause;
use tokio::time::Instant;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Tries until it succeeds, `timeout` is over or an error is hopeless, with growing pauses. Logs each new reason to wait.
pub async fn patiently<T, E, F>(
    address: &str,
    timeout: Duration,
    connect: impl Fn() -> F,
    hopeless: impl Fn(&E) -> bool,
) -> Result<T, E>
where
    E: std::error::Error + 'static,
    F: Future<Output = Result<T, E>>,
{
    let deadline = Instant::now() + timeout;
    let mut pause = FIRST_PAUSE;
    let mut reason = String::new();
    loop {
        let error = match connect().await {
            Ok(connected) => {
                if !reason.is_empty() {
                    tracing::info!("the coordinator at {address} is there");
                }
                return Ok(connected);
            }
            Err(error) => error,
        };
        if Instant::now() + pause > deadline || hopeless(&error) {
            return Err(error);
        }
        let now = root_cause(&error);
        if now != reason {
            tracing::info!("waiting up to {} s for the coordinator at {address}: {now}", timeout.as_secs());
            reason = now;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn refused() -> std::io::Error {
        std::io::ErrorKind::ConnectionRefused.into()
    }

    #[test]
    fn it_waits_for_the_coordinator_until_the_timeout() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let tries = Cell::new(0);
        let third = || {
            tries.set(tries.get() + 1);
            std::future::ready(if tries.get() < 3 { Err(refused()) } else { Ok(7) })
        };
        let hopeful = |_: &_| false;
        assert_eq!(runtime.block_on(patiently("a:1", Duration::from_secs(60), third, hopeful)).unwrap(), 7);
        assert_eq!(tries.get(), 3);
        let never = || std::future::ready(Err::<(), _>(refused()));
        assert!(runtime.block_on(patiently("a:1", Duration::from_millis(50), never, hopeful)).is_err());
    }

    #[test]
    fn a_hopeless_error_is_not_retried() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let tries = Cell::new(0);
        let shut = || {
            tries.set(tries.get() + 1);
            std::future::ready(Err::<(), _>(refused()))
        };
        assert!(runtime.block_on(patiently("a:1", Duration::from_secs(60), shut, |_| true)).is_err());
        assert_eq!(tries.get(), 1);
    }
}

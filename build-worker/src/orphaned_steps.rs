//! Cleanup of the processes that a killed engine has left running.

use std::{io, time::Duration};

use crate::step_processes::StepProcesses;

const LIMIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// Kills orphaned processes until there are none left; a failure is only logged.
pub(crate) async fn kill(processes: &StepProcesses) {
    let ending = async {
        loop {
            let processes = processes.clone();
            let ended = tokio::task::spawn_blocking(move || processes.kill_orphans());
            match ended.await.map_err(io::Error::other)?? {
                0 => return Ok::<(), io::Error>(()),
                count => tracing::warn!(count, "killed processes of builds that an engine has left behind"),
            }
            tokio::time::sleep(POLL).await;
        }
    };
    match tokio::time::timeout(LIMIT, ending).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "cannot end what an engine has left behind"),
        Err(_) => tracing::warn!("what an engine has left behind does not end"),
    }
}

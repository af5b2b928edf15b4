//! Client of the running host's admin address.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::data_folder;
use super::output::shown;
use crate::admin::{INSTANCE, Problem};
use crate::app::{held_folder, is_held, run_file};
use crate::config::Config;
use crate::hints::{Hint, Hints};

const ANSWER_BYTES_MAX: u64 = 16 << 20;
const HEALTH_BYTES_MAX: u64 = 16 << 10;
/// Longest wait for an answer to the question which host this is. Another program may use the port and
/// not answer.
const ASK_MAX: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(10) };
/// Longest wait for an answer that needs no I/O.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// Error: no host runs on the data folder of the config.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotRunning(String);

/// Error: a host runs on the data folder of the config, but does not answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoAnswer(String);

/// Sends `POST path` with a JSON body, and returns the JSON answer.
pub async fn post<T: DeserializeOwned>(
    config: &Config,
    path: &str,
    body: &impl Serialize,
) -> anyhow::Result<T> {
    let body = serde_json::to_string(body)?;
    let head =
        format!("POST {path} HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: {}", body.len());
    ask(config, &head, &body).await
}

/// Sends `GET path`, and returns the JSON answer.
pub async fn get<T: DeserializeOwned>(config: &Config, path: &str) -> anyhow::Result<T> {
    let asked = timeout(ASK_MAX + ANSWER_MAX, ask(config, &format!("GET {path} HTTP/1.1"), "")).await;
    asked.unwrap_or_else(|_| bail!(no_answer(config)))
}

/// Sends a request. `head` is its first line and its own headers.
async fn ask<T: DeserializeOwned>(config: &Config, head: &str, body: &str) -> anyhow::Result<T> {
    let folder = shown(&config.data_dir);
    let none = || {
        // A host whose folder was taken away, and whose address nobody knows, looks the same.
        let missing = match config.data_dir.exists() {
            true => "",
            false => ", which is not there (put it back where it was moved away from a host that runs)",
        };
        NotRunning(format!(
            "no host runs on the data folder {folder}{missing}: name its config with --config, or start it with `{}`",
            Hints::default().command(Hint::Run)
        ))
    };
    // What the running host wrote down, since its port may be any free one.
    data_folder::look(config)?;
    let may_not = |error| data_folder::refused(config, &error);
    let running = run_file::read(&config.data_dir).map_err(may_not)?;
    let held = is_held(&config.data_dir).map_err(may_not)?;
    let address = match (&running, config.admin.address()) {
        (Some(running), _) => running.admin,
        // A host of another machine has its data folder there.
        (None, Some(address)) if !address.ip().is_loopback() && !address.ip().is_unspecified() => address,
        // It has not written down yet where it listens, perhaps for want of room.
        (None, Some(address)) if address.port() != 0 && held => address,
        (None, _) if held => bail!(no_answer(config)),
        // Its data folder was moved or removed, and what it wrote down with it.
        (None, Some(address)) if address.port() != 0 && has_lost(reachable(address), config).await => {
            if !head.starts_with("GET ") && config.admin.token_file.is_none() {
                bail!(
                    "the host at {address} runs, and its data folder {folder} was moved or removed meanwhile, with \
                     the token that this takes: put the folder back; `{}` says more",
                    Hints::default().command(Hint::Status)
                );
            }
            address
        }
        (None, _) => bail!(none()),
    };
    let gone = |why: String| NotRunning(format!("{}: {why}", none()));
    let address = reachable(address);
    let of_run = || running.as_ref().map(|running| running.token.clone()).filter(|token| !token.is_empty());
    let token = config.admin.token().map_err(anyhow::Error::msg)?.or_else(of_run);
    let authorization = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    let asked = timeout(ASK_MAX, ask_instance(address)).await;
    let held = is_held(&config.data_dir).map_err(may_not)?;
    let instance = match (asked, &running) {
        (Ok(Ok(Some(instance))), None) => instance,
        (Ok(Ok(Some(instance))), Some(running)) if instance == running.instance => instance,
        _ if held => bail!(no_answer(config)),
        (Ok(Err(_)), Some(_)) => bail!(none()),
        (_, Some(_)) => bail!(gone(format!("another program has its port, {address}, now"))),
        (Ok(Err(error)), None) => bail!(NotRunning(format!("no host runs at {address}: {error}"))),
        (_, None) => bail!("{address} answers, but not as headworks: another program may use the port"),
    };
    let request = format!(
        "{head}\r\nhost: {address}\r\n{INSTANCE}: {instance}\r\n{authorization}connection: close\r\n\r\n{body}"
    );
    let mut stream = TcpStream::connect(address).await.map_err(|_| none())?;
    let mut answer = Vec::new();
    let asked = async {
        stream.write_all(request.as_bytes()).await?;
        (&mut stream).take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await
    };
    let is_answered = asked.await.is_ok();
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = match answer.split_once("\r\n\r\n") {
        Some(answer) if is_answered => answer,
        _ => bail!(NotRunning(format!(
            "the host on the data folder {folder} ended before it answered: what it had done by then stays done, and \
             the rest is not; start it with `{}`",
            Hints::default().command(Hint::Run)
        ))),
    };
    let code = head.split(' ').nth(1).unwrap_or_default();
    if code == "200" {
        return serde_json::from_str(body).with_context(|| format!("cannot read the answer of {address}"));
    }
    let error = serde_json::from_str::<serde_json::Value>(body).ok();
    match error.as_ref().and_then(|error| error.get("error")?.as_str()) {
        Some(error) => bail!("{error}"),
        None => bail!("the host at {address} answered {code}: {body}"),
    }
}

fn no_answer(config: &Config) -> NoAnswer {
    let folder = shown(&config.data_dir);
    let running = run_file::read(&config.data_dir).ok().flatten();
    let process = running.map(|running| format!(", process {},", running.pid));
    NoAnswer(format!(
        "the host on the data folder {folder}{} does not answer: it is starting, stopping, or hung; \
         check its log and the load of its machine",
        process.unwrap_or_default()
    ))
}

/// Returns the instance id of the host at an address; `None` if another program answers.
async fn ask_instance(address: SocketAddr) -> io::Result<Option<String>> {
    let Some(answer) = page(address, "/healthz", HEALTH_BYTES_MAX).await? else { return Ok(None) };
    let headers = answer.lines().skip(1).take_while(|line| !line.is_empty());
    let mut headers = headers.filter_map(|line| line.split_once(':'));
    let instance = headers.find(|(name, _)| name.eq_ignore_ascii_case(INSTANCE));
    Ok(instance.map(|(_, value)| value.trim().to_owned()))
}

/// Returns whether the host at an address reports that it has lost the data folder of the config.
async fn has_lost(address: SocketAddr, config: &Config) -> bool {
    let asked = timeout(ASK_MAX, page(address, "/api/problems", ANSWER_BYTES_MAX)).await;
    let Ok(Ok(Some(answer))) = asked else { return false };
    let folder = std::path::absolute(&config.data_dir).unwrap_or_else(|_| config.data_dir.clone());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let problems = serde_json::from_str::<Problems>(body).map_or_else(|_| Vec::new(), |all| all.problems);
    problems.iter().any(|problem| problem.part == held_folder::part(&folder))
}

#[derive(Deserialize)]
struct Problems {
    problems: Vec<Problem>,
}

/// Returns the whole answer to a request, with its headers; `None` if another program uses the port.
async fn page(address: SocketAddr, path: &str, bytes_max: u64) -> io::Result<Option<String>> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    let mut answer = Vec::new();
    let asked = async {
        stream.write_all(request.as_bytes()).await?;
        (&mut stream).take(bytes_max).read_to_end(&mut answer).await
    };
    let is_answered = asked.await.is_ok();
    Ok(is_answered.then(|| String::from_utf8_lossy(&answer).into_owned()))
}

/// Returns an address to connect to, for a host that listens on all addresses.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::app::run_file::RunFile;
    use crate::files::Locked;

    #[tokio::test]
    async fn a_host_that_ends_while_it_is_asked_is_not_looked_for_under_another_config() {
        let folder = tempfile::tempdir().unwrap();
        let dying = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = dying.local_addr().unwrap();
        let (file, data_dir) = (folder.path().join("headworks.yaml"), folder.path().join("data"));
        std::fs::write(&file, format!("data_dir: {}\n", data_dir.display())).unwrap();
        std::fs::create_dir(&data_dir).unwrap();
        let running = RunFile::new("this", (&[], &[]), admin, String::new());
        std::fs::write(data_dir.join("run.json"), serde_json::to_string(&running).unwrap()).unwrap();
        let config = crate::config::load(Some(&file)).unwrap().config;
        let serving = tokio::spawn(async move {
            let (mut first, _) = dying.accept().await.unwrap();
            // Else the answer is lost with the request that nobody read.
            let _ = first.read(&mut [0; 1_024]).await;
            first.write_all(format!("HTTP/1.1 200 OK\r\n{INSTANCE}: this\r\n\r\n").as_bytes()).await.unwrap();
            drop(first);
            let (mut second, _) = dying.accept().await.unwrap();
            let _ = second.read(&mut [0; 4]).await;
        });
        let error = post::<serde_json::Value>(&config, "/api/dead-letters/redrive", &()).await.unwrap_err();
        serving.abort();
        let said = error.to_string();
        assert!(error.is::<NotRunning>() && said.contains("ended before it answered"), "{said}");
        assert!(!said.contains("--config"), "{said}");
    }

    #[tokio::test]
    async fn a_host_that_does_not_answer_is_told_from_one_that_does_not_run() {
        let folder = tempfile::tempdir().unwrap();
        // Takes the connection, and says nothing.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = silent.local_addr().unwrap();
        let file = folder.path().join("headworks.yaml");
        let data_dir = folder.path().join("data");
        std::fs::write(&file, format!("data_dir: {}\nadmin: {{ bind: {admin} }}\n", data_dir.display()))
            .unwrap();
        std::fs::create_dir(&data_dir).unwrap();
        let config = crate::config::load(Some(&file)).unwrap().config;
        let asked = async || get::<serde_json::Value>(&config, "/api/status").await.unwrap_err();
        assert!(asked().await.is::<NotRunning>(), "nobody was ever there");

        let lock = Locked::exclusive(File::create(data_dir.join("LOCK")).unwrap()).unwrap();
        assert!(asked().await.is::<NoAnswer>(), "it starts, and has not written where it listens");
        let running = RunFile::new("this", (&[], &[]), admin, String::new());
        std::fs::write(data_dir.join("run.json"), serde_json::to_string(&running).unwrap()).unwrap();
        assert!(asked().await.is::<NoAnswer>());
        drop(silent);
        assert!(asked().await.is::<NoAnswer>(), "it ends, and listens no more");
        drop(lock);
        assert!(asked().await.is::<NotRunning>());
    }
}

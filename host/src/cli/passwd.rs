//! `headworks passwd`: changes the users of a password file.

use std::fs::{File, Metadata};
use std::io::{BufRead, IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;

use anyhow::{Context, bail};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use super::args::PasswdArgs;
use super::output::Out;
use crate::access::{ITERATIONS_DEFAULT, PasswordFile};

pub fn passwd(args: &PasswdArgs, out: &mut Out) -> anyhow::Result<()> {
    let (file, user) = (args.file.display(), &args.user);
    let mut users = match std::fs::read(&args.file) {
        Ok(bytes) => PasswordFile::parse(&bytes).map_err(|reason| anyhow::anyhow!("{file}: {reason}"))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !args.delete => PasswordFile::default(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {file}")),
    };
    let done = if args.delete {
        if !users.remove(user) {
            bail!("{file} has no user \"{user}\"");
        }
        if users.names().next().is_none() {
            bail!(
                "\"{user}\" is the last user of {file}, and a running host goes on with the old users when a file \
                 has none: give \"{user}\" another password instead; nothing was changed"
            );
        }
        "removed"
    } else {
        let password = read_password()?;
        if password.is_empty() {
            bail!("the password is empty: nothing was changed");
        }
        let scram = args.scram.then_some(args.scram_iterations.unwrap_or(ITERATIONS_DEFAULT));
        let is_changed = users.set(user, &password, scram).map_err(anyhow::Error::msg)?;
        if is_changed { "changed" } else { "added" }
    };
    replace(&args.file, &users.to_text()).with_context(|| format!("cannot write {file}"))?;
    out.line(format!("user \"{user}\" {done}"))
}

/// Replaces a file atomically. A new file is readable only by its owner; an existing one keeps its
/// owner, group and mode, so that the host can still read it.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    // A link stays one.
    let path = &std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = (|| {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        if let Ok(old) = std::fs::metadata(path) {
            keep_owner(&file, &old)?;
            file.set_permissions(old.permissions())?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // What failed is said; a file left behind is only in the way.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

fn keep_owner(file: &File, old: &Metadata) -> std::io::Result<()> {
    let new = file.metadata()?;
    if (new.uid(), new.gid()) == (old.uid(), old.gid()) {
        return Ok(());
    }
    fchown(file, Some(old.uid()), Some(old.gid())).map_err(|error| {
        let (user, group) = (old.uid(), old.gid());
        let told = format!(
            "cannot keep its owner (user {user}, group {group}): {error}: run this as that user or as root; \
             nothing was changed"
        );
        std::io::Error::new(error.kind(), told)
    })
}

fn read_password() -> anyhow::Result<String> {
    if !std::io::stdin().is_terminal() {
        return line();
    }
    let password = ask("Password: ")?;
    if ask("Again: ")? != password {
        bail!("the two passwords differ: nothing was changed");
    }
    Ok(password)
}

/// Reads one line from the terminal without echo.
fn ask(prompt: &str) -> anyhow::Result<String> {
    let stdin = std::io::stdin();
    eprint!("{prompt}");
    let before = tcgetattr(&stdin)?;
    let mut silent = before.clone();
    silent.local_modes.remove(LocalModes::ECHO);
    silent.local_modes.insert(LocalModes::ECHONL);
    tcsetattr(&stdin, OptionalActions::Flush, &silent)?;
    let read = line();
    tcsetattr(&stdin, OptionalActions::Flush, &before)?;
    read
}

fn line() -> anyhow::Result<String> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\n', '\r']).to_owned())
}

//! Warnings about settings in `mqtt.access` that are valid but probably not intended.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::config::{Authenticator, Config};
use super::passwords::Users;
use super::rules::fits_glob;

impl Config {
    /// Returns the warnings, each beginning with a key below `mqtt.access`. Reads the files of users.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.authenticate.is_empty() && self.client_ids.is_empty() {
            warnings.push(
                "client_ids: is left out: a user who knows the client id of another user's session can take it over; \
                 set it to [\"%u\", \"%u-*\"] or the like"
                    .to_owned(),
            );
        }
        for (i, authenticator) in self.authenticate.iter().enumerate() {
            let secret = match authenticator {
                Authenticator::Passwords(passwords) => Some(&passwords.file),
                Authenticator::Jwt(jwt) => jwt.secret_file.as_ref(),
                _ => None,
            };
            if let Some(file) = secret.filter(|file| is_for_all(file)) {
                warnings.push(format!("authenticate[{i}]: {}", readable(file)));
            }
        }
        warnings.extend(self.unknown_users());
        warnings
    }

    /// Returns the names and fields of users in rules that occur in no file of users, if no other
    /// authenticator knows users.
    fn unknown_users(&self) -> Vec<String> {
        let file = |authenticator: &Authenticator| match authenticator {
            Authenticator::Passwords(passwords) => {
                Users::parse(&crate::files::read(&passwords.file).ok()?).ok()
            }
            _ => None,
        };
        let Some(files) = self.authenticate.iter().map(file).collect::<Option<Vec<_>>>() else {
            return Vec::new();
        };
        if files.is_empty() {
            return Vec::new();
        }
        let is_user = |glob: &str| files.iter().flat_map(Users::names).any(|name| fits_glob(glob, name));
        let of_rules = self.rules.iter().enumerate().filter_map(|(i, rule)| {
            let glob = rule.user.as_deref().filter(|glob| !is_user(glob))?;
            Some(format!(
                "rules[{i}].user: no user of the password file is `{glob}`: the rule decides nothing"
            ))
        });
        let fields = self.users.keys().filter(|name| !is_user(name));
        let of_fields = fields.map(|name| format!("users.{name}: the password file has no such user"));
        of_rules.chain(of_fields).collect()
    }

    /// Returns whether clients may send a secret that an eavesdropper could use.
    pub fn takes_secrets(&self) -> bool {
        self.authenticate.iter().any(|one| {
            matches!(one, Authenticator::Passwords(_) | Authenticator::Jwt(_) | Authenticator::Http(_))
        })
    }

    pub fn takes_certificates(&self) -> bool {
        self.authenticate.iter().any(|one| matches!(one, Authenticator::Certificate(_)))
    }
}

/// Returns whether all users of this machine can read the file.
pub fn is_for_all(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|file| file.permissions().mode() & 0o004 != 0)
}

pub fn readable(file: &Path) -> String {
    format!("{0} can be read by every user of this machine: chmod o-rwx {0}", file.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hardly_meant_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("passwords");
        let mut users = Users::default();
        users.set("ann", "a", None).unwrap();
        std::fs::write(&file, users.to_text()).unwrap();
        let warnings = |mode, more: &str| {
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
            let yaml = format!("authenticate: [{{ type: passwords, file: '{}' }}]\n{more}", file.display());
            let config: Config = serde_json::from_value(crate::yaml::to_json(&yaml).unwrap()).unwrap();
            let key = |warning: String| warning.split(": ").next().unwrap().to_owned();
            config.warnings().into_iter().map(key).collect::<Vec<_>>()
        };
        let rules = "rules: [{ effect: deny, user: anna, topics: [a] }, { effect: allow, user: 'a*', topics: [a] }]\n\
                     users: { bob: { site: x }, ann: { site: y } }";
        assert_eq!(warnings(0o644, rules), ["client_ids", "authenticate[0]", "rules[0].user", "users.bob"]);
        assert_eq!(warnings(0o640, "client_ids: ['%u']"), [""; 0]);
    }
}

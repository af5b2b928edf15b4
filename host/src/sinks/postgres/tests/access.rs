//! TLS, passwords, rights.

use super::*;
use crate::sinks::Password;

#[tokio::test]
async fn a_server_that_takes_the_connection_and_says_nothing_is_given_up_after_connect_timeout() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = Config {
        url: Url(format!("postgres://writer@{}/iot", silent.local_addr().unwrap())),
        connect_timeout: crate::units::Period(std::time::Duration::from_millis(50)),
        ..Config::default()
    };
    let error = sink(config).open(&claim(), None).await.err().unwrap();
    assert!(matches!(&error, Error::Retry(reason) if reason.ends_with("no answer for 0.05 s")), "{error}");
}

#[tokio::test]
async fn a_host_that_takes_the_connection_and_says_nothing_is_passed_over_for_the_next() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent.local_addr().unwrap();
    let fresh = Fresh::new().await;
    let with = |first: &str, url: &str, ms| Config {
        url: Url(url.replacen('@', &format!("@{first},"), 1)),
        connect_timeout: crate::units::Period(std::time::Duration::from_millis(ms)),
        ..Config::default()
    };
    let url = format!("{}?target_session_attrs=read-write", fresh.url);
    let config = with(&silent.to_string(), &url, 3_000);
    sink(config.clone()).open(&claim(), None).await.unwrap();
    let checked = super::super::check("warehouse", &config, Arc::default(), Vec::new()).await;
    assert_eq!(checked.problems, [""; 0]);
    let config = with(&silent.to_string(), &format!("postgres://w@{silent}/iot"), 50);
    let error = sink(config).open(&claim(), None).await.unwrap_err().to_string();
    assert!(
        error.ends_with(&format!("{silent}: no answer for 0.05 s; {silent}: no answer for 0.05 s")),
        "{error}"
    );
}

/// A server with a certificate for `localhost` from its own CA, and passwords.
pub(super) fn guarded() -> (Server, std::path::PathBuf) {
    let mut server = Server::start(&[]);
    let dir = server.dir().to_owned();
    let openssl = |arguments: &str| {
        let output = std::process::Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(&dir)
            .output()
            .unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.pem",
    );
    openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -keyout s.key -out s.csr",
    );
    server.write("ext", "subjectAltName=DNS:localhost\n");
    openssl("x509 -req -in s.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out s.pem");
    show(&server, "s");
    let psql = |sql: &str| {
        let url = server.url();
        let output = std::process::Command::new("psql").args([&url, "-qc", sql]).output().unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    };
    psql("CREATE ROLE writer LOGIN PASSWORD 'open sesame'");
    psql("CREATE DATABASE iot OWNER writer");
    server.write("data/postgresql.auto.conf", "ssl = on\n");
    server.write("data/pg_hba.conf", "hostssl all writer all scram-sha-256\nhost all postgres all trust\n");
    server.kill();
    server.resume();
    let ca = dir.join("ca.pem");
    (server, ca)
}

/// Has the server show this certificate from its next start on.
fn show(server: &Server, name: &str) {
    for (from, to) in [("key", "data/server.key"), ("pem", "data/server.crt")] {
        let text = std::fs::read_to_string(server.dir().join(name).with_extension(from)).unwrap();
        server.write(to, &text);
    }
}

#[tokio::test]
async fn the_certificates_that_postgresql_documents_are_taken_as_libpq_takes_them() {
    let (mut server, ca) = tokio::task::spawn_blocking(guarded).await.unwrap();
    let dir = server.dir().to_owned();
    let openssl = |arguments: &str| {
        let mut command = std::process::Command::new("openssl");
        let output = command.args(arguments.split(' ')).current_dir(&dir).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    // Signed by itself, and signed without extensions, which is version 1: 19.9.5.
    openssl(&format!("req -new -x509 -days 2 {KEY} -subj /CN=localhost -keyout self.key -out self.pem"));
    openssl(&format!("req -new {KEY} -subj /CN=localhost -keyout v1.key -out v1.csr"));
    let sign = "x509 -req -days 2 -in v1.csr -CAcreateserial";
    openssl(&format!("{sign} -CA ca.pem -CAkey ca.key -out v1.pem"));
    // Version 3 without alternative names, and with those of another host.
    for (name, extension) in
        [("cn", "basicConstraints=CA:FALSE\n"), ("san", "subjectAltName=DNS:elsewhere\n")]
    {
        server.write("ext", extension);
        openssl(&format!("{sign} -CA ca.pem -CAkey ca.key -extfile ext -out {name}.pem"));
        std::fs::copy(dir.join("v1.key"), dir.join(name).with_extension("key")).unwrap();
    }
    // Of another CA with the same name.
    openssl(&format!("req -x509 {KEY} -days 2 -subj /CN=ca -keyout other.key -out other.pem"));
    let open = |port: u16, host: &str, mode: SslMode, ca: &str| {
        let config = Config {
            url: Url(format!("postgres://postgres@{host}:{port}/iot")),
            sslmode: Some(mode),
            tls: Tls { ca: (!ca.is_empty()).then(|| dir.join(ca)), ..Tls::default() },
            ..Config::default()
        };
        async move { sink(config).open(&claim(), None).await.map(|_| ()).map_err(|error| format!("{error:?}")) }
    };
    assert_eq!(ca, dir.join("ca.pem"));
    for (name, version, by, names_host) in [
        ("self", "TLSv1.3", "self.pem", true),
        ("v1", "TLSv1.3", "ca.pem", true),
        ("v1", "TLSv1.2", "ca.pem", true),
        ("v1", "TLSv1.2", "v1.pem", true),
        ("cn", "TLSv1.3", "ca.pem", true),
        ("san", "TLSv1.3", "ca.pem", false),
    ] {
        server = tokio::task::spawn_blocking(move || {
            show(&server, name);
            server.write(
                "data/postgresql.auto.conf",
                &format!("ssl = on\nssl_max_protocol_version = '{version}'\n"),
            );
            server.kill();
            server.resume();
            server
        })
        .await
        .unwrap();
        let port = server.port;
        for mode in [SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull] {
            let outcome = open(port, "localhost", mode, by).await;
            assert_eq!(
                outcome.is_ok(),
                names_host || mode != SslMode::VerifyFull,
                "{name} {mode:?} {outcome:?}"
            );
            let outcome = open(port, "127.0.0.1", mode, by).await;
            assert_eq!(outcome.is_ok(), mode != SslMode::VerifyFull, "{name} {mode:?} {outcome:?}");
            let stranger = open(port, "localhost", mode, "other.pem").await.unwrap_err();
            assert!(stranger.starts_with("Setup"), "{name} {mode:?} {stranger}");
        }
        open(port, "localhost", SslMode::Require, "").await.expect("nothing is verified");
        let system = open(port, "localhost", SslMode::VerifyFull, "").await.unwrap_err();
        assert!(system.starts_with("Setup"), "{name} {system}");
    }
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
}

#[tokio::test]
async fn tls_and_passwords_are_as_sslmode_says() {
    let (server, ca) = tokio::task::spawn_blocking(guarded).await.unwrap();
    let password = Some(Password::File(server.write("password", "open sesame\n")));
    let open = |host: &str, mode: SslMode, ca: Option<&std::path::Path>, password: Option<Password>| {
        let config = Config {
            url: Url(format!("postgres://writer@{host}:{}/iot", server.port)),
            sslmode: Some(mode),
            tls: Tls { ca: ca.map(Into::into), ..Tls::default() },
            password,
            ..Config::default()
        };
        async move { sink(config).open(&claim(), None).await.map(|_| ()).map_err(|error| format!("{error:?}")) }
    };
    let by_ca = Some(ca.as_path());
    open("localhost", SslMode::VerifyFull, by_ca, password.clone()).await.expect("the name is in it");
    open("127.0.0.1", SslMode::VerifyCa, by_ca, password.clone()).await.expect("the name does not count");
    open("127.0.0.1", SslMode::Require, None, password.clone()).await.expect("nothing is verified");
    open("127.0.0.1", SslMode::Prefer, None, password.clone()).await.expect("nothing is verified");

    let stranger = open("127.0.0.1", SslMode::VerifyFull, by_ca, password.clone()).await.unwrap_err();
    assert!(stranger.starts_with("Setup") && stranger.contains("certificate"), "{stranger}");
    let unknown_ca = open("localhost", SslMode::VerifyFull, None, password.clone()).await.unwrap_err();
    assert!(unknown_ca.starts_with("Setup"), "{unknown_ca}");
    let plain = open("localhost", SslMode::Disable, None, password.clone()).await.unwrap_err();
    assert!(plain.starts_with("Setup") && plain.contains("28000"), "{plain}");

    let wrong = Some(Password::File(server.write("wrong", "close sesame")));
    let wrong = open("localhost", SslMode::Require, None, wrong).await.unwrap_err();
    assert!(wrong.starts_with("Setup") && wrong.contains("28P01"), "{wrong}");
    assert!(wrong.contains("password authentication failed for user \\\"writer\\\""), "{wrong}");
    assert!(!wrong.contains("sesame"), "{wrong}");
    let none = open("localhost", SslMode::Require, None, None).await.unwrap_err();
    assert!(none.starts_with("Setup"), "{none}");
    let unset = Some(Password::Env("HEADWORKS_TEST_NO_SUCH_VARIABLE".to_owned()));
    let unset = open("localhost", SslMode::Require, None, unset).await.unwrap_err();
    assert!(unset.contains("HEADWORKS_TEST_NO_SUCH_VARIABLE for the password is not set"), "{unset}");
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
}

#[test]
fn a_password_comes_from_the_environment() {
    // PATH is set everywhere; tests that run beside this one may not be given another variable.
    assert_eq!(Password::Env("PATH".to_owned()).read("password"), Ok(std::env::var("PATH").unwrap()));
}

#[tokio::test]
async fn a_user_without_rights_is_told_which_table_cannot_be_made() {
    let fresh = Fresh::new().await;
    let role = format!("r{}", uuid::Uuid::new_v4().simple());
    fresh
        .execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'x'; REVOKE CREATE ON SCHEMA public FROM PUBLIC"
        ))
        .await;
    let target = Url(fresh.url.clone()).target();
    let config = Config { url: Url(format!("postgres://{role}:x@{target}")), ..fresh.config() };
    let error = sink(config).open(&claim(), None).await.unwrap_err();
    fresh.execute(&format!("DROP ROLE {role}")).await;
    let text = error.to_string();
    assert!(matches!(error, Error::Setup(_)) && text.contains("headworks_positions"), "{text}");
}

#[tokio::test]
async fn options_of_the_url_reach_the_server() {
    let fresh = Fresh::with("CREATE SCHEMA iot; CREATE TABLE iot.telemetry ({TABLE})").await;
    let names = async || -> Vec<String> {
        let sql = "SELECT application_name FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
        fresh.client().await.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    };
    let written = async || -> i64 {
        let sql = "SELECT count(*) FROM iot.telemetry";
        fresh.client().await.query_one(sql, &[]).await.unwrap().get(0)
    };
    let with = |options: &str| Config { url: Url(format!("{}?{options}", fresh.url)), ..fresh.config() };
    let mut named = sink(with("application_name=line-4&options=-c%20search_path%3Diot"));
    named.open(&claim(), None).await.unwrap();
    named.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    assert_eq!(written().await, 1, "the search path of the url counts");
    assert!(names().await.contains(&"line-4".to_owned()));
    let mut other = sink(with("sslmode=prefer"));
    other.open(&Claim { pipeline: "other".to_owned(), ..claim() }, None).await.unwrap();
    assert!(names().await.contains(&"headworks/warehouse".to_owned()));
}

#[tokio::test]
async fn the_rights_that_the_docs_name_are_enough() {
    const DOCS: &str = include_str!("../../../../docs/databases.md");
    let role = format!("r{}", uuid::Uuid::new_v4().simple());
    let fresh = Fresh::with("CREATE TABLE telemetry (id SERIAL, {TABLE}, CHECK (value < 100))").await;
    let database = fresh.url.rsplit('/').next().unwrap();
    let block = DOCS.split("```sql\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let sql = block.replace("writer", &role).replace("DATABASE iot", &format!("DATABASE {database}"));
    let (always, upsert) = (
        sql.lines().filter(|line| !line.contains("only for")).collect::<Vec<_>>().join("\n"),
        sql.lines().filter(|line| line.contains("only for")).collect::<String>(),
    );
    fresh.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
    fresh.execute(&format!("REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC")).await;
    fresh.execute(&always.replace("PASSWORD '…'", "PASSWORD 'x'")).await;
    let url = fresh.url.replacen("postgres://postgres@", &format!("postgres://{role}:x@"), 1);
    let config = Config { url: Url(url), ..fresh.config() };
    let mut sink = self::sink(config.clone());
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    rejected(sink.commit(&rows([("a", "2"), ("a", "500")]), &[advance(0, 1, 3)]).await);
    sink.finish().await.unwrap();
    fresh.execute("CREATE UNIQUE INDEX ON telemetry (device_id, value)").await;
    fresh.execute(&upsert).await;
    let mut upserts = self::sink(Config { on_conflict: OnConflict::Upsert, ..config });
    upserts.open(&claim(), None).await.unwrap();
    upserts.commit(&rows([("a", "2"), ("a", "3")]), &[advance(0, 3, 5)]).await.unwrap();
    assert_eq!(fresh.written().await.len(), 3);
    drop((sink, upserts));
    fresh.execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_sink_without_the_right_to_isolate_rows_says_so_before_the_first_bad_row() {
    let fresh = Fresh::with("CREATE TABLE telemetry ({TABLE}, CHECK (value < 100))").await;
    let writer = super::check::Writer::new(&fresh).await;
    let database = fresh.url.rsplit('/').next().unwrap();
    fresh
        .execute(&format!(
            "REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC; GRANT ALL ON SCHEMA public TO PUBLIC;
             GRANT INSERT ON telemetry TO PUBLIC"
        ))
        .await;
    let mut sink = sink(writer.config());
    let error = sink.open(&claim(), None).await.unwrap_err();
    assert!(matches!(error, Error::Setup(_)), "{error:?}");
    writer.follow(&error.to_string()).await;
    sink.open(&claim(), None).await.unwrap();
    fresh.execute("REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC").await;
    let error = sink.open(&claim(), None).await.unwrap_err();
    assert!(matches!(error, Error::Setup(_)), "{error:?}");
    let said = super::check::problem(writer.config()).await;
    assert!(error.to_string().ends_with(&said), "{error}: {said}");
    writer.follow(&said).await;
    // What no right says.
    fresh
        .execute(
            "CREATE FUNCTION no() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
                     RAISE 'no DDL for applications'; END IF; END $$;
             CREATE EVENT TRIGGER no ON ddl_command_start EXECUTE FUNCTION no()",
        )
        .await;
    let error = sink.open(&claim(), None).await.unwrap_err();
    let is_told =
        |text: &str| text.contains("no DDL for applications") && text.contains("isolate rejected rows");
    assert!(matches!(&error, Error::Setup(text) if is_told(text)), "{error:?}");
    let said = super::check::problem(writer.config()).await;
    assert!(is_told(&said), "{said}");
    fresh.execute("DROP EVENT TRIGGER no").await;
    assert_eq!(super::check::check(writer.config()).await.problems, [""; 0]);
    sink.open(&claim(), None).await.unwrap();
    rejected(sink.commit(&rows([("a", "1"), ("a", "500")]), &[advance(0, 0, 2)]).await);
    assert_eq!(sink.finish().await.unwrap().written, 1);
    drop(sink);
    writer.end().await;
}

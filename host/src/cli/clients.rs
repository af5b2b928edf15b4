//! `headworks clients`: lists, shows, disconnects and deletes clients.

use std::num::NonZeroUsize;

use anyhow::bail;
use serde_json::json;

use super::args::{ClientSort, ClientsCommand, Format};
use super::output::{Out, one_line, time};
use super::{admin_client, block_on};
use crate::admin::{ClientList, ClientListRequest, RefusedClientsRequest};
use crate::config::{self, Config, Loaded};
use crate::hints::Hint;
use crate::listeners::mqtt::{Client, ClientOrder};
use crate::listeners::refused_clients::RefusedClient;

const USER_CHARS_MAX: usize = 60;
/// Clients in a text list, unless `--max` asks for more.
const LISTED_MAX: usize = 100;
/// Clients in one answer of the host.
const PAGE_MAX: usize = 1_000;
/// Most clients that the host lists in another order than by id.
const ORDERED_MAX: usize = 10_000;

pub fn clients(command: ClientsCommand, out: &mut Out) -> anyhow::Result<()> {
    match command {
        ClientsCommand::List { prefix, max, sort, config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            let max = listed_max(max, format.format);
            list(&config, &prefix.unwrap_or_default(), max, order(sort), format.format, out)
        }
        ClientsCommand::Show { client_id, config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            show(&config, &client_id, format.format, out)
        }
        ClientsCommand::Refused { max, config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            refused(&config, listed_max(max, format.format), format.format, out)
        }
        ClientsCommand::Kick { client_id, config } => {
            let Loaded { config, source, .. } = config::load(config.config.as_deref())?;
            if !is_done(&config, &client_id, "/api/clients/kick", "kicked")? {
                let list = source.hints().command(Hint::ClientsList);
                bail!("no client \"{client_id}\" is connected: `{list}` shows who is");
            }
            out.line(format!("{client_id} is disconnected"))
        }
        ClientsCommand::Delete { client_id, config } => {
            let Loaded { config, source, .. } = config::load(config.config.as_deref())?;
            if !is_done(&config, &client_id, "/api/clients/delete", "deleted")? {
                let list = source.hints().command(Hint::ClientsList);
                bail!("no client \"{client_id}\" has a session: `{list}` shows who has");
            }
            out.line(format!("the session of {client_id} is deleted"))
        }
    }
}

/// Sends a request and returns whether the host did what was asked, according to `name` in its answer.
fn is_done(config: &Config, client_id: &str, path: &str, name: &str) -> anyhow::Result<bool> {
    let request = json!({ "client_id": client_id });
    let answer: serde_json::Value = block_on(admin_client::post(config, path, &request))?;
    Ok(answer[name] == true)
}

fn order(sort: ClientSort) -> ClientOrder {
    match sort {
        ClientSort::Id => ClientOrder::Id,
        ClientSort::Published => ClientOrder::Published,
        ClientSort::Delivered => ClientOrder::Delivered,
        ClientSort::Queued => ClientOrder::Queued,
        ClientSort::Missed => ClientOrder::Missed,
        ClientSort::Refused => ClientOrder::Refused,
    }
}

/// Returns the number of clients to list. JSON output is cut only if `--max` asks for it.
fn listed_max(max: Option<NonZeroUsize>, format: Format) -> usize {
    let default = if format == Format::Json { usize::MAX } else { LISTED_MAX };
    max.map_or(default, NonZeroUsize::get)
}

fn list(
    config: &Config,
    prefix: &str,
    max: usize,
    order: ClientOrder,
    format: Format,
    out: &mut Out,
) -> anyhow::Result<()> {
    let ClientList { found, clients } = ask_for(config, prefix, max, order)?;
    if format == Format::Json {
        return clients.iter().try_for_each(|client| out.json(client));
    }
    if clients.is_empty() {
        return out.line("no clients");
    }
    let shown = clients.len();
    for client in clients {
        out.flow(0, &parts(&serde_json::from_value(client)?))?;
    }
    say_more(found, shown, ", a PREFIX only the ids that begin with it", out)
}

/// Prints that a list was cut, and how to see all of it.
fn say_more(found: usize, shown: usize, also: &str, out: &mut Out) -> anyhow::Result<()> {
    if found <= shown {
        return Ok(());
    }
    out.line(format!("\n{} more: --max {found} shows all{also}", found - shown))
}

/// Requests the first `max` clients, page by page. In another order than by id the host lists at most
/// [`ORDERED_MAX`]; for more, this function requests all clients by id and sorts them.
fn ask_for(config: &Config, prefix: &str, max: usize, order: ClientOrder) -> anyhow::Result<ClientList> {
    let ask = |after: String, max: usize, order: ClientOrder| -> anyhow::Result<ClientList> {
        let request = ClientListRequest { prefix: prefix.to_owned(), max, order, after };
        block_on(admin_client::post(config, "/api/clients/list", &request))
    };
    if order != ClientOrder::Id && max <= ORDERED_MAX {
        return ask(String::new(), max, order);
    }
    let wanted = if order == ClientOrder::Id { max } else { usize::MAX };
    let mut all = ask(String::new(), wanted.min(PAGE_MAX), ClientOrder::Id)?;
    while all.clients.len() < wanted.min(all.found) {
        let last = all.clients.last().and_then(|client| client["client_id"].as_str()).unwrap_or_default();
        let page = ask(last.to_owned(), (wanted - all.clients.len()).min(PAGE_MAX), ClientOrder::Id)?;
        if page.clients.is_empty() {
            // They left meanwhile.
            break;
        }
        all.found = all.clients.len() + page.found;
        all.clients.extend(page.clients);
    }
    if order != ClientOrder::Id {
        let key = |client: &serde_json::Value| -> u64 {
            let client = serde_json::from_value(client.clone());
            client.map_or(0, |client: Client| order.key(&client))
        };
        all.clients.sort_by_cached_key(|client| std::cmp::Reverse(key(client)));
        all.clients.truncate(max);
    }
    Ok(all)
}

fn parts(client: &Client) -> Vec<String> {
    let mut parts = vec![one_line(&client.client_id, usize::MAX)];
    match &client.connection {
        Some(connection) => {
            let user =
                connection.user.as_deref().map_or("anonymous".to_owned(), |user| format!("user {user}"));
            parts.extend([
                one_line(&user, USER_CHARS_MAX),
                connection.address.clone(),
                format!("MQTT {}", connection.version),
                format!("since {}", time(connection.since_us)),
            ]);
        }
        None => parts.push(format!("away since {}", time(client.disconnected_us.unwrap_or_default()))),
    }
    let Client { subscriptions, queued, in_flight, counts, .. } = client;
    parts.push(format!("filters: {subscriptions}, queued: {queued}, in flight: {in_flight}"));
    parts.push(format!("published: {}, delivered: {}", counts.published, counts.delivered));
    for (what, count) in [("missed", counts.missed()), ("refused", counts.refused())] {
        parts.push(if count > 0 { format!("{what}: {count}") } else { String::new() });
    }
    parts
}

fn refused(config: &Config, max: usize, format: Format, out: &mut Out) -> anyhow::Result<()> {
    let request = RefusedClientsRequest { max };
    let list: ClientList = block_on(admin_client::post(config, "/api/clients/refused", &request))?;
    if format == Format::Json {
        return list.clients.iter().try_for_each(|client| out.json(client));
    }
    if list.clients.is_empty() {
        return out.line("no client was refused since the host started");
    }
    let shown = list.clients.len();
    for client in list.clients {
        let RefusedClient { who, address, cause, detail, count, first_us: _, last_us } =
            serde_json::from_value(client)?;
        let who = who.map_or("no name".to_owned(), |who| one_line(&who, USER_CHARS_MAX));
        let times = format!("{count} times");
        let parts = [who, address.to_string(), cause, times, format!("last {}", time(last_us))];
        out.flow(0, &parts)?;
        out.paragraph(4, &one_line(&detail, usize::MAX))?;
    }
    say_more(list.found, shown, "", out)
}

fn show(config: &Config, client_id: &str, format: Format, out: &mut Out) -> anyhow::Result<()> {
    let request = json!({ "client_id": client_id });
    let client: serde_json::Value = block_on(admin_client::post(config, "/api/clients/show", &request))?;
    if format == Format::Json {
        return out.json(&client);
    }
    let client: Client = serde_json::from_value(client)?;
    let expiry = match client.session_expiry_s {
        Some(0) => "with its connection".to_owned(),
        Some(seconds) => format!("{seconds} s after its connection"),
        None => "never".to_owned(),
    };
    let mut fields = vec![("client", one_line(&client.client_id, usize::MAX)), ("session ends", expiry)];
    match &client.connection {
        Some(connection) => {
            let user = connection.user.as_deref().map(|user| one_line(user, usize::MAX));
            fields.push(("connected since", time(connection.since_us)));
            fields.push(("address", connection.address.clone()));
            fields.push(("user", user.unwrap_or_else(|| "anonymous".into())));
            fields.push(("MQTT", connection.version.clone()));
            fields.push(("keep alive", format!("{} s", connection.keep_alive_s)));
        }
        None => fields.push(("away since", time(client.disconnected_us.unwrap_or_default()))),
    }
    fields.push(("queued", format!("{} messages, {} bytes", client.queued, client.queued_bytes)));
    fields.push(("in flight", client.in_flight.to_string()));
    fields.push(("session", format!("{} bytes", client.session_bytes)));
    if let Some(us) = client.last_seen_us {
        fields.push(("last seen", time(us)));
    }
    let counts = &client.counts;
    fields.push(("published", format!("{} messages, {} bytes", counts.published, counts.published_bytes)));
    fields.push(("delivered", format!("{} messages", counts.delivered)));
    let causes = |causes: &[(&str, u64)]| {
        let some: Vec<_> = causes.iter().filter(|(_, count)| *count > 0).collect();
        let some: Vec<_> = some.iter().map(|(cause, count)| format!("{count} {cause}")).collect();
        if some.is_empty() { "none".to_owned() } else { some.join(", ") }
    };
    let missed = [
        ("queue full or too old", counts.dropped),
        ("expired", counts.expired),
        ("too large", counts.too_large),
        ("not allowed", counts.withheld),
        ("not in their stream any more", counts.gone),
    ];
    fields.push(("missed", causes(&missed)));
    let refused = [
        ("publishes", counts.refused_publishes),
        ("subscriptions", counts.refused_subscribes),
        ("QoS 0 publishes, disk full", counts.no_space),
    ];
    fields.push(("refused", causes(&refused)));
    if counts.throttled > 0 {
        let why = "for the rates of mqtt.limits";
        fields.push(("read slower", format!("{} times, {why}", counts.throttled)));
    }
    if client.takeovers > 0 {
        let what = "lately that connections with this client id ended each other";
        fields.push(("taken over", format!("{} times {what}", client.takeovers)));
    }
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in fields {
        out.field(name, width, &value)?;
    }
    for filter in &client.filters {
        out.field("subscribed", width, &one_line(filter, usize::MAX))?;
    }
    Ok(())
}

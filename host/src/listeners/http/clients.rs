//! Who the requests of one connection come from. What access control said of a client is kept for its next
//! requests; requests of other clients, which a gateway may send over the same connection, never wait for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::MutexGuard;

use super::Http;
use super::answer::Refusal;
use super::credentials::{Client, Shown};
use crate::listeners::transport::Remote;

/// Clients of one connection that are kept while none of their requests is under way.
const CLIENTS_MAX: usize = 8;

/// The clients of one connection.
#[derive(Default)]
pub struct Clients {
    /// The one that was used last is the last.
    slots: Mutex<Vec<Arc<Slot>>>,
    has_admitted: AtomicBool,
}

/// One client of a connection, by what its requests show.
pub struct Slot {
    pub shown: Shown,
    /// `None`: not let in, or not yet. Requests that show the same wait for one admission.
    client: tokio::sync::Mutex<Option<Client>>,
}

impl Clients {
    /// Returns the slot of a client, without asking access control.
    pub fn slot(&self, shown: Shown) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match slots.iter().position(|slot| slot.shown == shown) {
            Some(known) => slots.remove(known),
            None => {
                let is_idle = |slot: &Arc<Slot>| Arc::strong_count(slot) == 1;
                // A gateway that posts for one device after the other takes one place of its user.
                slots.retain(|slot| !(is_idle(slot) && slot.shown.is_same_user(&shown)));
                if slots.len() >= CLIENTS_MAX
                    && let Some(oldest) = slots.iter().position(is_idle)
                {
                    slots.remove(oldest);
                }
                Arc::new(Slot { shown, client: tokio::sync::Mutex::default() })
            }
        };
        slots.push(slot.clone());
        slot
    }

    /// Lets the client of the slot in, unless it is already.
    pub async fn admit<'s>(
        &self,
        http: &Http,
        remote: &Remote,
        slot: &'s Slot,
    ) -> Result<MutexGuard<'s, Option<Client>>, Refusal> {
        let mut client = slot.client.lock().await;
        if !client.as_ref().is_some_and(|client| client.holds(&http.access, remote)) {
            // The client is checked again, as if it had not been admitted before.
            *client = None;
            let is_first = !self.has_admitted.load(Ordering::Acquire);
            *client = Some(Client::admit(http, &slot.shown, remote, is_first).await?);
            self.has_admitted.store(true, Ordering::Release);
        }
        Ok(client)
    }
}

impl Slot {
    /// Returns what the client is called in the log; nothing where it was not let in.
    pub async fn name(&self) -> Arc<str> {
        self.client.lock().await.as_ref().map_or_else(|| "".into(), |client| client.name.clone())
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderMap;

    use super::*;

    fn shown(client_id: &'static str, token: &'static str) -> Shown {
        let mut headers = HeaderMap::new();
        headers.insert("client-id", client_id.parse().unwrap());
        headers.insert("authorization", format!("Bearer {token}").parse().unwrap());
        Shown::read(&headers).unwrap()
    }

    fn kept(clients: &Clients) -> Vec<(&'static str, &'static str)> {
        let all = [("a", "1"), ("b", "1"), ("c", "2")];
        let slots = clients.slots.lock().unwrap();
        all.into_iter().filter(|(id, token)| slots.iter().any(|it| it.shown == shown(id, token))).collect()
    }

    #[test]
    fn the_last_clients_of_a_connection_are_kept_and_of_one_user_one() {
        let clients = Clients::default();
        let first = clients.slot(shown("a", "1"));
        assert!(Arc::ptr_eq(&first, &clients.slot(shown("a", "1"))));
        drop(clients.slot(shown("b", "1")));
        assert_eq!(kept(&clients), [("a", "1"), ("b", "1")], "a request of one is under way");
        drop(first);
        drop(clients.slot(shown("c", "2")));
        assert_eq!(kept(&clients), [("a", "1"), ("b", "1"), ("c", "2")]);
        drop(clients.slot(shown("d", "1")));
        assert_eq!(kept(&clients), [("c", "2")]);
        for token in ["3", "4", "5", "6", "7", "8", "9"] {
            drop(clients.slot(shown("e", token)));
        }
        assert_eq!(clients.slots.lock().unwrap().len(), CLIENTS_MAX);
        assert!(kept(&clients).is_empty());
    }
}

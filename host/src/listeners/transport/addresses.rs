//! The addresses of a listener. A reload opens new ones, closes those that are gone, and changes what is
//! served on the others, whose sockets and connections stay.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connections::Connections;
use super::handshakes::Handshakes;
use super::reload::keep_certificates;
use super::tls::Tls;
use super::{Bind, Entry, Error, Layers, Plan, Service, accept};

/// Tells the connections of an address that it is closed.
#[derive(Debug, Default)]
pub struct Closing {
    is_closed: AtomicBool,
    closed: CancellationToken,
}

impl Closing {
    /// Returns whether the address is closed.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Waits until the address is closed. Cancel safe.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.closed.cancel();
    }
}

/// An address that is served.
pub(super) struct Gate {
    /// Changes only for new connections.
    layers: RwLock<Arc<Layers>>,
    pub closing: Arc<Closing>,
    pub handshakes: Arc<Handshakes>,
}

impl Gate {
    pub fn layers(&self) -> Arc<Layers> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Places for connections in their handshakes.
pub enum HandshakePlaces {
    /// Each address has as many.
    Each(usize),
    /// All addresses share these.
    Shared(Arc<Handshakes>),
}

/// The addresses of one listener.
pub struct Addresses<S> {
    service: Arc<S>,
    served: Mutex<Vec<Served>>,
    /// Accept loops of closed addresses, whose sockets are about to close.
    ending: Mutex<Vec<JoinHandle<()>>>,
    connections: Arc<Connections>,
    handshakes: Mutex<HandshakePlaces>,
    certificates: watch::Sender<Vec<Arc<Tls>>>,
    tasks: TaskTracker,
}

struct Served {
    /// Address with its actual port.
    address: Bind,
    gate: Arc<Gate>,
    accepting: JoinHandle<()>,
}

/// Changes of the addresses, of which nothing is in force yet. Dropping this closes what it has opened.
pub struct AddressChanges {
    /// The addresses in the order of the configuration.
    next: Vec<Next>,
    /// What changes, in words for a person.
    pub told: Vec<String>,
}

enum Next {
    /// The address at this place stays.
    Stays {
        at: usize,
        layers: Option<Arc<Layers>>,
    },
    Opens(Box<Entry>),
}

impl<S: Service> Addresses<S> {
    /// Begins to accept connections.
    pub fn serve(
        service: Arc<S>,
        entries: Vec<Entry>,
        connections: Arc<Connections>,
        handshakes: HandshakePlaces,
        (tasks, hangup): (TaskTracker, Option<Signal>),
    ) -> Self {
        let certificates = watch::Sender::new(Vec::new());
        tasks.spawn(keep_certificates(service.clone(), certificates.subscribe(), hangup));
        let (handshakes, ending) = (Mutex::new(handshakes), Mutex::default());
        let served = Mutex::default();
        let addresses = Self { service, served, ending, connections, handshakes, certificates, tasks };
        *addresses.lock() = entries.into_iter().map(|entry| addresses.open(entry)).collect();
        addresses.show_certificates();
        addresses
    }

    /// Returns the bound addresses with their actual ports, in the order of the configuration.
    pub fn bound(&self) -> Vec<Bind> {
        self.lock().iter().map(|served| served.address.clone()).collect()
    }

    /// Prepares to serve these plans: binds addresses that are not served yet, and loads the certificates of
    /// those whose files are others. Changes nothing that runs.
    pub async fn prepare(&self, plans: Vec<Plan>) -> Result<AddressChanges, Error> {
        // An address that was closed a moment ago may be opened again.
        let ending = std::mem::take(&mut *self.ending.lock().unwrap_or_else(PoisonError::into_inner));
        for accepting in ending {
            // A panic there is the process's to report.
            let _ = accepting.await;
        }
        let name = S::NAME;
        let now: Vec<_> = self.lock().iter().map(|served| served.gate.layers()).collect();
        let mut is_left: Vec<_> = now.iter().map(|_| true).collect();
        let (mut next, mut told) = (Vec::new(), Vec::new());
        for plan in plans {
            let bind = plan.endpoint.bind.clone();
            let is_same = |at: &usize| is_left[*at] && now[*at].plan.endpoint.bind == bind;
            let Some(at) = (0..now.len()).find(is_same) else {
                told.push(format!("{name}: listens on {bind}"));
                let opened = Entry::bind(plan).await.map_err(|error| overlap(error, &now));
                next.push(Next::Opens(Box::new(opened?)));
                continue;
            };
            is_left[at] = false;
            let layers =
                if now[at].plan == plan { None } else { Some(Arc::new(now[at].succeeded_by(plan)?)) };
            if let Some(layers) = &layers {
                told.extend(now[at].plan.changes(&layers.plan).map(|it| format!("{name}: {bind}: {it}")));
            }
            next.push(Next::Stays { at, layers });
        }
        for (layers, _) in now.iter().zip(is_left).filter(|(_, is_left)| *is_left) {
            let bind = &layers.plan.endpoint.bind;
            told.push(format!("{name}: no longer listens on {bind}; connections through it end"));
        }
        Ok(AddressChanges { next, told })
    }

    /// Puts changes in force that [`Self::prepare`] has made since the last ones. `before_opening` is called
    /// once addresses that are gone are closed, and the others serve whom they are to serve.
    pub fn commit(&self, changes: AddressChanges, before_opening: impl FnOnce()) {
        let mut served = self.lock();
        let mut left: Vec<_> = std::mem::take(&mut *served).into_iter().map(Some).collect();
        let take = |next: Next| match next {
            Next::Opens(entry) => Some(Err(entry)),
            Next::Stays { at, layers } => {
                let stays = left.get_mut(at).and_then(Option::take)?;
                if let Some(layers) = layers {
                    stays.change(layers);
                }
                Some(Ok(stays))
            }
        };
        let next: Vec<_> = changes.next.into_iter().filter_map(take).collect();
        for Served { gate, accepting, .. } in left.into_iter().flatten() {
            gate.closing.close();
            self.ending.lock().unwrap_or_else(PoisonError::into_inner).push(accepting);
        }
        before_opening();
        *served = next.into_iter().map(|next| next.unwrap_or_else(|entry| self.open(*entry))).collect();
        drop(served);
        self.show_certificates();
    }

    /// Changes the bound of connections, and that of handshakes of each address or of all of them.
    pub fn set_bounds(&self, connections: usize, handshakes: usize) {
        self.connections.set_max(connections);
        match &mut *self.handshakes.lock().unwrap_or_else(PoisonError::into_inner) {
            HandshakePlaces::Each(max) => *max = handshakes,
            HandshakePlaces::Shared(places) => places.set_max(handshakes),
        }
        self.lock().iter().for_each(|served| served.gate.handshakes.set_max(handshakes));
    }

    fn open(&self, Entry { plan, listener, tls }: Entry) -> Served {
        let handshakes = match &*self.handshakes.lock().unwrap_or_else(PoisonError::into_inner) {
            HandshakePlaces::Each(max) => Handshakes::new(*max),
            HandshakePlaces::Shared(places) => places.clone(),
        };
        let address = listener.address();
        let layers = RwLock::new(Arc::new(Layers::new(plan, tls)));
        let gate = Arc::new(Gate { layers, closing: Arc::default(), handshakes });
        let (service, connections, tasks) =
            (self.service.clone(), self.connections.clone(), self.tasks.clone());
        let accepting = accept(service, listener, gate.clone(), connections, tasks);
        Served { address, gate, accepting: self.tasks.spawn(accepting) }
    }

    fn show_certificates(&self) {
        let all = self.lock().iter().filter_map(|served| served.gate.layers().tls.clone()).collect();
        self.certificates.send_if_modified(|shown: &mut Vec<Arc<Tls>>| {
            let is_same = |(a, b): (&Arc<Tls>, &Arc<Tls>)| Arc::ptr_eq(a, b);
            let all: Vec<Arc<Tls>> = all;
            let changes = shown.len() != all.len() || !shown.iter().zip(&all).all(is_same);
            *shown = all;
            changes
        });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the error that names an address of this host which is in the way of a new one: every address of
/// the machine and one of them cannot be listened on with the same port.
fn overlap(error: Error, now: &[Arc<Layers>]) -> Error {
    let Error::Bind { bind, error } = error else { return error };
    let is_in_use = error.kind() == std::io::ErrorKind::AddrInUse;
    let mut bound = now.iter().map(|layers| &layers.plan.endpoint.bind);
    match bound.find(|other| is_in_use && bind.port().is_some() && other.port() == bind.port()) {
        Some(with) => Error::Overlaps { bind, with: with.clone() },
        None => Error::Bind { bind, error },
    }
}

impl Served {
    /// Serves new connections by other layers. Clients that are connected keep theirs; whether they may be
    /// anonymous, and whether their certificates are trusted, is asked of the new ones.
    fn change(&self, next: Arc<Layers>) {
        let mut layers = self.gate.layers.write().unwrap_or_else(PoisonError::into_inner);
        let allows = next.plan.endpoint.allow_anonymous;
        next.entrance.set_allows_anonymous(allows);
        if let Some(tls) = layers.tls.as_ref().filter(|tls| !next.tls.iter().any(|it| Arc::ptr_eq(it, tls))) {
            tls.give_way_to(next.tls.clone());
        }
        let mode = next.plan.endpoint.mode;
        let has_mode = layers.plan.endpoint.mode == mode;
        *layers = next;
        drop(layers);
        if let (Bind::Unix(path), false) = (&self.address, has_mode)
            && let Err(error) = super::listen::set_mode(path, mode.unwrap_or_default())
        {
            tracing::warn!(%error, "the mode of the socket {} stays as it was: set it by hand", path.display());
        }
    }
}

impl Plan {
    /// Returns what differs, in words for a person.
    fn changes(&self, next: &Self) -> impl Iterator<Item = &'static str> {
        let (a, b) = (&self.endpoint, &next.endpoint);
        let differs = [
            (a.tls != b.tls, "tls changes for new connections"),
            (a.proxy_protocol != b.proxy_protocol, "proxy_protocol changes for new connections"),
            (self.websocket != next.websocket, "websocket changes for new connections"),
            (a.mode != b.mode, "the socket's file gets another mode"),
            (!a.allow_anonymous && b.allow_anonymous, "clients without credentials are served"),
            (
                a.allow_anonymous && !b.allow_anonymous,
                "clients without credentials are no longer served; with mqtt.access they are disconnected",
            ),
        ];
        differs.into_iter().filter_map(|(differs, told)| differs.then_some(told))
    }
}

//! The MQTT clients, for the admin port.

use async_trait::async_trait;

use crate::admin::{ClientList, ClientListRequest, Clients};
use crate::listeners::mqtt;

pub struct MqttClients(pub mqtt::Clients);

#[async_trait]
impl Clients for MqttClients {
    fn list(&self, request: &ClientListRequest) -> ClientList {
        let (found, clients) = self.0.list(&request.prefix, &request.after, request.max, request.order);
        ClientList { found, clients: clients.iter().map(to_json).collect() }
    }

    fn show(&self, client_id: &str) -> Option<serde_json::Value> {
        self.0.show(client_id).as_ref().map(to_json)
    }

    fn refused(&self, max: usize) -> ClientList {
        let (found, clients) = self.0.refused(max);
        ClientList { found, clients: clients.iter().map(to_json).collect() }
    }

    async fn kick(&self, client_id: &str) -> bool {
        self.0.kick(client_id).await
    }

    async fn delete(&self, client_id: &str) -> bool {
        self.0.delete(client_id).await
    }
}

fn to_json(client: &impl serde::Serialize) -> serde_json::Value {
    serde_json::to_value(client).expect("strings and numbers")
}

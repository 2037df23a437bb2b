//! A worker played by the test: speaks the dispatch protocol and sends what the test orders.

use std::{collections::VecDeque, time::Duration};

use image_service::Role;
use proto::dispatch::{
    Assignment, Attempt, Built, ConnectRequest, ConnectResponse, Heartbeat, Hello, Report, ReportEvent,
    Started, Succeeded, Welcome, assignment::Work, connect_request::Message as ToService,
    connect_response::Message as FromService, report_event::Event,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

use crate::stack::{LIMIT, Service};

/// A connected worker under the control of a test.
pub(crate) struct Actor {
    pub(crate) requests: mpsc::Sender<ConnectRequest>,
    pub(crate) responses: Streaming<ConnectResponse>,
    pub(crate) welcome: Welcome,
    /// Assignments that arrived before the acknowledgement of the report that freed the slot.
    early: VecDeque<FromService>,
}

pub(crate) fn hello(name: &str, holds: &[Attempt]) -> Hello {
    Hello {
        name: name.to_owned(),
        slots: 1,
        engine_version: "none".to_owned(),
        protocol_version: 1,
        holds: holds.to_vec(),
        instance: format!("process of {name}"),
        capabilities: ["dockerfile", "pull", "snapshot"].map(str::to_owned).into(),
        ..Hello::default()
    }
}

pub(crate) fn say(message: ToService) -> ConnectRequest {
    ConnectRequest { message: Some(message) }
}

/// ID of an image in an engine, for actors that report artifacts.
pub(crate) const IMAGE_ID: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

/// Heartbeats that an [`Actor`] sends until this is dropped.
pub(crate) struct Pulse {
    _task: AbortOnDropHandle<()>,
}

impl Pulse {
    /// Number from which the heartbeats are counted; their acknowledgements are skipped.
    const FIRST: i64 = 1 << 32;
    const INTERVAL: Duration = Duration::from_millis(50);
}

impl Actor {
    /// Sends heartbeats for as long as the returned pulse lives, whatever else the test does.
    pub(crate) fn pulse(&self, draining: bool) -> Pulse {
        let requests = self.requests.clone();
        let beating = async move {
            for number in Pulse::FIRST.. {
                if requests.send(say(ToService::Heartbeat(Heartbeat { number, draining }))).await.is_err() {
                    return;
                }
                tokio::time::sleep(Pulse::INTERVAL).await;
            }
        };
        Pulse { _task: AbortOnDropHandle::new(tokio::spawn(beating)) }
    }

    /// Connects and sends only a `Hello`.
    pub(crate) async fn greet(service: &Service, hello: Hello) -> Result<Self, Status> {
        Self::greet_with(service, &service.token(&hello.name, &[Role::Worker]), hello).await
    }

    async fn greet_with(service: &Service, token: &str, hello: Hello) -> Result<Self, Status> {
        let (requests, stream) = mpsc::channel(16);
        let client = service.client(token);
        requests.send(say(ToService::Hello(hello))).await.expect("the stream is held below");
        let mut responses = client.dispatch.clone().connect(ReceiverStream::new(stream)).await?.into_inner();
        let first = responses.message().await?.and_then(|response| response.message);
        let Some(FromService::Welcome(welcome)) = first else {
            panic!("{first:?} is no welcome");
        };
        Ok(Self { requests, responses, welcome, early: VecDeque::new() })
    }

    /// Connects and sends one heartbeat, after which the service acts on the `Hello`.
    pub(crate) async fn connect(service: &Service, hello: Hello) -> Result<Self, Status> {
        Self::connect_with(service, &service.token(&hello.name, &[Role::Worker]), hello).await
    }

    /// Connects as [`Self::connect`] does, with this token.
    pub(crate) async fn connect_with(service: &Service, token: &str, hello: Hello) -> Result<Self, Status> {
        let mut actor = Self::greet_with(service, token, hello).await?;
        actor.say(ToService::Heartbeat(Heartbeat { number: 0, draining: false })).await;
        match actor.next().await {
            Ok(FromService::HeartbeatAck(ack)) if ack.number == 0 => Ok(actor),
            Ok(message) => panic!("{message:?} does not acknowledge the first heartbeat"),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    pub(crate) async fn say(&self, message: ToService) {
        self.requests.send(say(message)).await.expect("the connection lives");
    }

    pub(crate) async fn report(&self, attempt: &Attempt, first_sequence: i64, events: Vec<Event>) {
        let events = events.into_iter().map(|event| ReportEvent { time: None, event: Some(event) }).collect();
        let report = Report { attempt: Some(attempt.clone()), first_sequence, events };
        self.say(ToService::Report(report)).await;
    }

    pub(crate) async fn next(&mut self) -> anyhow::Result<FromService> {
        if let Some(message) = self.early.pop_front() {
            return Ok(message);
        }
        self.receive().await
    }

    async fn receive(&mut self) -> anyhow::Result<FromService> {
        loop {
            let response = tokio::time::timeout(LIMIT, self.responses.message()).await??;
            match response.and_then(|response| response.message) {
                Some(FromService::HeartbeatAck(ack)) if ack.number >= Pulse::FIRST => {}
                Some(message) => return Ok(message),
                None => anyhow::bail!("the connection ended"),
            }
        }
    }

    pub(crate) async fn assignment(&mut self) -> anyhow::Result<(Assignment, Attempt)> {
        let message = self.next().await?;
        let FromService::Assignment(assignment) = message else {
            anyhow::bail!("{message:?} is no assignment");
        };
        let attempt = assignment.attempt.clone().expect("an assignment names its attempt");
        Ok((assignment, attempt))
    }

    /// Takes the next assignment, whatever its kind, and reports success.
    pub(crate) async fn build_next(&mut self) -> anyhow::Result<()> {
        self.build_and_push_next("").await
    }

    /// Takes the next assignment, whatever its kind, and reports success with a digest in the registry.
    pub(crate) async fn build_and_push_next(&mut self, repo_digest: &str) -> anyhow::Result<()> {
        let (assignment, attempt) = self.assignment().await?;
        let image_id = format!("sha256:{:064}", attempt.build_id.len());
        let repo_digest = repo_digest.to_owned();
        let succeeded =
            Event::Succeeded(Succeeded { image_id, size_bytes: 1, repo_digest, ..Succeeded::default() });
        let events = match assignment.work {
            Some(Work::DockerBuild(_)) => {
                self.report(&attempt, 1, vec![Event::Started(Started {}), Event::Built(Built {})]).await;
                let messages = [self.next().await?, self.next().await?];
                anyhow::ensure!(
                    messages.iter().any(|message| matches!(message, FromService::PublishGrant(_))),
                    "{messages:?} has no grant"
                );
                (3, vec![succeeded])
            }
            Some(Work::Snapshot(_) | Work::Pull(_)) => (1, vec![Event::Started(Started {}), succeeded]),
            None => anyhow::bail!("an assignment without work"),
        };
        self.report(&attempt, events.0, events.1).await;
        self.acknowledged().await.map(|_| ())
    }

    pub(crate) async fn acknowledged(&mut self) -> anyhow::Result<i64> {
        loop {
            let message = self.receive().await?;
            if let FromService::ReportAck(ack) = message {
                return Ok(ack.sequence);
            }
            anyhow::ensure!(
                matches!(message, FromService::Assignment(_)),
                "{message:?} is no acknowledgement"
            );
            self.early.push_back(message);
        }
    }
}

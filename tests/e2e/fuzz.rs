//! Random and mutated requests to every RPC, by callers of every role: no panic, no `INTERNAL`, and bounded
//! memory.
//!
//! `TRAILER_TEST_REQUESTS` sets the number of requests and `TRAILER_TEST_SEED` the seed; by default this
//! takes a few seconds.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use image_service::Role;
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, MethodDescriptor, Value,
};
use proto::{
    dispatch::{self, connect_request::Message as ToService},
    images as api,
};
use tonic::{Code, Request, Status, client::Grpc, metadata::AsciiMetadataValue, transport::Channel};
use tonic_types::StatusExt as _;

use self::corpus::Corpus;
use crate::{
    client::{channel, image},
    constraints::Constraints,
    programs::Catalogue,
    raw::Raw,
    stack::{LIMIT, number},
};

mod corpus;

const CLIENTS: u64 = 16;
const TEXTS: [&str; 16] = [
    "",
    "alice",
    "a",
    "FROM scratch",
    "../..",
    "\0",
    "a\nb",
    "é\u{301}🦀",
    "00000000-0000-0000-0000-000000000000",
    "%_\\",
    "name desc, id",
    "trailer.invalid/x",
    "sha256:",
    "4",
    "-1",
    "' OR 1=1 --",
];
const NUMBERS: [i64; 9] = [0, 1, -1, 2, 50, 1_000, i32::MAX as i64, i64::MAX, i64::MIN];

/// A caller that sends random requests.
struct Fuzzer {
    random: fastrand::Rng,
    corpus: Corpus,
    methods: Vec<MethodDescriptor>,
    constraints: Arc<Constraints>,
    /// Name of the worker that the worker token is for.
    worker: String,
    tokens: Vec<AsciiMetadataValue>,
    channel: Channel,
}

impl Fuzzer {
    fn text(&mut self) -> String {
        match self.random.u8(..20) {
            0 if self.random.u8(..4) == 0 => "x".repeat(self.random.usize(..6_000)),
            1..=4 => (0..self.random.usize(..4)).map(|_| TEXTS[self.random.usize(..TEXTS.len())]).collect(),
            5 => uuid::Builder::from_random_bytes(self.random.u128(..).to_be_bytes()).into_uuid().to_string(),
            6..=9 => TEXTS[self.random.usize(..TEXTS.len())].to_owned(),
            _ => self.corpus.any(&mut self.random).unwrap_or_default(),
        }
    }

    fn number(&mut self) -> i64 {
        if self.random.bool() { NUMBERS[self.random.usize(..NUMBERS.len())] } else { self.random.i64(-3..20) }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "any number will do")]
    fn one(&mut self, kind: &Kind, depth: u8) -> Value {
        match kind {
            Kind::Double => Value::F64([0.0, f64::NAN, f64::INFINITY, -1.5][self.random.usize(..4)]),
            Kind::Float => Value::F32([0.0, f32::NAN, f32::INFINITY, -1.5][self.random.usize(..4)]),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(self.number() as i32),
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(self.number()),
            Kind::Uint32 | Kind::Fixed32 => Value::U32(self.number() as u32),
            Kind::Uint64 | Kind::Fixed64 => Value::U64(self.number() as u64),
            Kind::Bool => Value::Bool(self.random.bool()),
            Kind::String => Value::String(self.text()),
            Kind::Bytes => {
                let length = if self.random.u8(..8) == 0 { 4_000 } else { 40 };
                Value::Bytes((0..self.random.usize(..length)).map(|_| self.random.u8(..)).collect())
            }
            Kind::Message(message) => Value::Message(self.message(message, depth + 1)),
            Kind::Enum(values) => {
                let known: Vec<i32> = values.values().map(|value| value.number()).collect();
                let is_known = self.random.u8(..10) > 0;
                Value::EnumNumber(if is_known {
                    known[self.random.usize(..known.len())]
                } else {
                    self.number() as i32
                })
            }
        }
    }

    fn field(&mut self, field: &FieldDescriptor, depth: u8) -> Value {
        if field.is_map() {
            let (Kind::Message(entry), count) = (field.kind(), self.random.usize(..3)) else {
                return Value::Map(Default::default());
            };
            let (key, value) = (entry.map_entry_key_field(), entry.map_entry_value_field());
            return Value::Map(
                (0..count)
                    .filter_map(|_| {
                        let key: MapKey = self.one(&key.kind(), depth).into_map_key()?;
                        Some((key, self.one(&value.kind(), depth)))
                    })
                    .collect(),
            );
        }
        if field.is_list() {
            let is_long = depth == 0 && self.random.u8(..100) == 0;
            let count = if is_long { 1_100 } else { self.random.usize(..3) };
            return Value::List((0..count).map(|_| self.one(&field.kind(), depth)).collect());
        }
        self.one(&field.kind(), depth)
    }

    fn message(&mut self, descriptor: &MessageDescriptor, depth: u8) -> DynamicMessage {
        let mut message = DynamicMessage::new(descriptor.clone());
        if depth > 5 {
            return message;
        }
        for field in descriptor.fields() {
            // Set only a part of the fields, because a configuration is deeply nested.
            if self.random.u8(..10) < 6_u8.saturating_sub(depth) {
                let value = self.field(&field, depth);
                message.set_field(&field, value);
            }
        }
        message
    }

    /// Returns a request of this method: a valid one or one of random fields, sometimes mutated.
    fn request(&mut self, method: &MethodDescriptor) -> Bytes {
        let good = (self.random.u8(..3) == 0).then(|| self.good(method.name())).flatten();
        let mut bytes = good.unwrap_or_else(|| self.message(&method.input(), 0).encode_to_vec());
        if self.random.u8(..4) == 0 {
            self.mutate(&mut bytes);
        }
        bytes.into()
    }

    fn good(&mut self, method: &str) -> Option<Vec<u8>> {
        let id = self.corpus.any(&mut self.random).unwrap_or_default();
        Some(match method {
            "CreateImage" => {
                let name = format!("Image {}", self.random.u16(..));
                api::CreateImageRequest { image: Some(image(&name, "FROM scratch")), ..Default::default() }
                    .encode_to_vec()
            }
            "BuildImage" => api::BuildImageRequest { id, ..Default::default() }.encode_to_vec(),
            "WatchImages" => api::WatchImagesRequest::default().encode_to_vec(),
            "WatchBuild" => api::WatchBuildRequest { id, after_sequence: 0 }.encode_to_vec(),
            "Connect" => {
                let hello = dispatch::Hello {
                    name: self.worker.clone(),
                    slots: 2,
                    protocol_version: 1,
                    instance: self.worker.clone(),
                    capabilities: vec!["dockerfile".to_owned()],
                    ..Default::default()
                };
                dispatch::ConnectRequest { message: Some(ToService::Hello(hello)) }.encode_to_vec()
            }
            _ => return None,
        })
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.random.usize(1..4) {
            let at = self.random.usize(..=bytes.len());
            match self.random.u8(..4) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, self.random.u8(..)),
                2 => bytes.splice(at..at, (0..8).map(|_| self.random.u8(..))).for_each(drop),
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.random.u8(..8);
                    }
                }
            }
        }
    }

    /// Checks that a request that was accepted satisfies the constraints of the protocol.
    fn require_valid(&self, method: &MethodDescriptor, messages: &[Bytes]) -> Result<(), Status> {
        for message in messages {
            let violations = self.constraints.violations(method.input().full_name(), message);
            match violations.map_err(|error| Status::unknown(error.to_string()))? {
                Some(violations) if !method.is_client_streaming() => {
                    let message = format!("{} accepts what violates {violations}", method.full_name());
                    return Err(Status::unknown(message));
                }
                Some(_) | None => {}
            }
        }
        Ok(())
    }

    /// Calls a random method and returns its name and the code of the result.
    async fn call(&mut self) -> Result<(String, Code), Status> {
        let method = self.methods[self.random.usize(..self.methods.len())].clone();
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        let count = if method.is_client_streaming() { self.random.usize(..5) } else { 1 };
        let messages: Vec<Bytes> = (0..count).map(|_| self.request(&method)).collect();
        let mut request = Request::new(futures_util::stream::iter(messages.clone()));
        if let Some(token) = self.tokens.get(self.random.usize(..self.tokens.len() + 1)) {
            request.metadata_mut().insert("authorization", token.clone());
        }
        // Streams would never end.
        request.set_timeout(if method.is_server_streaming() { Duration::from_millis(40) } else { LIMIT });
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| Status::unknown(error.to_string()))?;
        let path = path.parse().map_err(|_| Status::unknown("a path"))?;
        let answered = match grpc.streaming(request, path, Raw).await {
            Err(status) => Err(status),
            Ok(response) => {
                let mut answers = response.into_inner();
                loop {
                    match answers.message().await {
                        Ok(None) => break Ok(()),
                        Ok(Some(bytes)) => {
                            let answer = DynamicMessage::decode(method.output(), bytes).map_err(|error| {
                                Status::unknown(format!("no {}: {error}", method.output().name()))
                            })?;
                            self.corpus.collect(&answer, &mut self.random);
                        }
                        Err(status) => break Err(status),
                    }
                }
            }
        };
        let code = match answered {
            Ok(()) => {
                self.require_valid(&method, &messages)?;
                Code::Ok
            }
            Err(status) if is_allowed(&status) => status.code(),
            Err(status) => return Err(Status::unknown(format!("{}: {status:?}", method.full_name()))),
        };
        Ok((method.full_name().to_owned(), code))
    }
}

/// Reports whether a call may end with this status.
fn is_allowed(status: &Status) -> bool {
    let has_reason = status.get_details_error_info().is_some_and(|info| !info.reason.is_empty());
    match status.code() {
        Code::Internal | Code::Unknown | Code::DataLoss | Code::Ok => false,
        // The client may have ended the call first.
        Code::DeadlineExceeded | Code::Cancelled => true,
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unavailable
        | Code::Unauthenticated => has_reason,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_requests_break_nothing() -> anyhow::Result<()> {
    const MOST_MEMORY: u64 = 400 * 1024 * 1024;
    let (requests, seed) = (number("TRAILER_TEST_REQUESTS", 10_000), number("TRAILER_TEST_SEED", 1));
    let catalogue = Catalogue::create().await?;
    let flags = ["--max-call-rate", "0", "--max-pending-builds", "0", "--offline-after", "2s"];
    let mut service = catalogue.replica("image-service", &["RUST_LOG=warn"], &flags).await?;
    let pool = DescriptorPool::decode(proto::FILE_DESCRIPTOR_SET)?;
    let methods: Vec<MethodDescriptor> =
        pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()).collect();
    let constraints = Arc::new(Constraints::load()?);
    let corpus = Corpus::default();
    let left = Arc::new(AtomicUsize::new(usize::try_from(requests)?));
    let mut fuzzing = tokio::task::JoinSet::new();
    for i in 0..CLIENTS {
        let worker = format!("w{i}");
        let roles = [Role::Admin, Role::Builder, Role::Builder, Role::Service];
        let tokens = roles
            .into_iter()
            .map(|role| catalogue.token("alice", role))
            .chain([catalogue.token("bob", Role::Builder), catalogue.token(&worker, Role::Worker)])
            .map(|token| Ok(format!("Bearer {token}").parse()?))
            .collect::<anyhow::Result<_>>()?;
        let mut fuzzer = Fuzzer {
            random: fastrand::Rng::with_seed(seed * CLIENTS + i),
            corpus: corpus.clone(),
            methods: methods.clone(),
            constraints: Arc::clone(&constraints),
            worker,
            tokens,
            channel: channel(service.addr),
        };
        let left = Arc::clone(&left);
        fuzzing.spawn(async move {
            let mut ends: HashMap<(String, Code), usize> = HashMap::new();
            let next = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            while next().is_ok() {
                *ends.entry(fuzzer.call().await?).or_default() += 1;
            }
            Ok::<_, Status>(ends)
        });
    }
    let mut ends: HashMap<(String, Code), usize> = HashMap::new();
    while let Some(done) = fuzzing.join_next().await {
        for (end, count) in done?.with_context(|| format!("seed {seed}"))? {
            *ends.entry(end).or_default() += count;
        }
    }
    let called: BTreeSet<&str> = ends.keys().map(|(method, _)| method.as_str()).collect();
    assert_eq!(called.len(), methods.len(), "every method was called");
    // Some requests must get past validation, and some must name an image that exists.
    let by_id = ["GetImage", "EnableImage", "DisableImage", "CloneImage", "RenderDockerfile", "UpdateImage"];
    for group in [&["CreateImage"][..], &["ListImages"], &by_id] {
        let is_of_group = |called: &str| {
            called.strip_prefix("trailer.images.v1.ImageService.").is_some_and(|name| group.contains(&name))
        };
        let passed = ends
            .keys()
            .any(|(called, code)| is_of_group(called) && matches!(code, Code::Ok | Code::DeadlineExceeded));
        assert!(passed, "none of {group:?} ever succeeds: {ends:#?}");
    }
    service.program.require_life()?;
    let log = catalogue.log("image-service")?;
    assert!(
        !log.contains("a panic") && !log.contains("internal error"),
        "seed {seed}: {}",
        service.program.output()
    );
    let peak = service.program.peak_memory()?;
    assert!(peak < MOST_MEMORY, "{peak} bytes");
    println!("{requests} requests of seed {seed}: at most {} MiB\n{ends:#?}", peak >> 20);
    Ok(())
}

//! A client that knows only server reflection, like `grpcurl` and `buf curl`.

use anyhow::Context as _;
use bytes::{Buf as _, BufMut as _};
use image_service::Role;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;

use crate::{
    answers::refused,
    client::channel,
    eventually::eventually_true,
    fake_engine::FakeEngine,
    stack::{LIMIT, Service, Worker},
};

/// A codec that encodes any message and decodes messages of one type.
#[derive(Clone, Debug)]
struct DynamicCodec(MessageDescriptor);

impl Codec for DynamicCodec {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        self.clone()
    }

    fn decoder(&mut self) -> Self {
        self.clone()
    }
}

impl Encoder for DynamicCodec {
    type Item = DynamicMessage;
    type Error = Status;

    fn encode(&mut self, item: DynamicMessage, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        dst.put_slice(&item.encode_to_vec());
        Ok(())
    }
}

impl Decoder for DynamicCodec {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let bytes = src.copy_to_bytes(src.remaining());
        DynamicMessage::decode(self.0.clone(), bytes)
            .map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

/// A client that calls methods by name, with JSON.
struct Generic {
    pool: DescriptorPool,
    channel: Channel,
    token: String,
}

impl Generic {
    /// Calls `Service/Method` and returns its messages, up to the first for which `is_enough` holds.
    async fn call(
        &self,
        method: &str,
        request: serde_json::Value,
        is_enough: impl Fn(&serde_json::Value) -> bool,
    ) -> anyhow::Result<Vec<serde_json::Value>> {
        let (service, name) = method.split_once('/').context("Service/Method")?;
        let service =
            self.pool.get_service_by_name(service).with_context(|| format!("no service {service}"))?;
        let method = service
            .methods()
            .find(|method| method.name() == name)
            .with_context(|| format!("no method {name}"))?;
        let mut request = Request::new(DynamicMessage::deserialize(method.input(), request)?);
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.token).parse()?);
        let path = format!("/{}/{name}", service.full_name()).parse()?;
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await?;
        let mut stream =
            grpc.server_streaming(request, path, DynamicCodec(method.output())).await?.into_inner();
        let mut answers = Vec::new();
        while let Some(message) = tokio::time::timeout(LIMIT, stream.message()).await?? {
            answers.push(serde_json::to_value(&message)?);
            if answers.last().is_some_and(&is_enough) {
                break;
            }
        }
        Ok(answers)
    }

    async fn unary(&self, method: &str, request: serde_json::Value) -> anyhow::Result<serde_json::Value> {
        self.call(method, request, |_| false).await?.pop().context("an answer")
    }
}

/// Loads all services by reflection, in one of the two versions of the protocol.
macro_rules! learn {
    ($version:ident, $service:expr) => {{
        use pb::{server_reflection_request::MessageRequest, server_reflection_response::MessageResponse};
        use tonic_reflection::pb::$version as pb;
        let mut client = pb::server_reflection_client::ServerReflectionClient::new(channel($service.addr));
        let mut call = async |message_request| {
            let request =
                pb::ServerReflectionRequest { host: String::new(), message_request: Some(message_request) };
            let mut answers =
                client.server_reflection_info(tokio_stream::iter([request])).await?.into_inner();
            let answer = answers.message().await?.and_then(|answer| answer.message_response);
            anyhow::Ok(answer.context("no answer")?)
        };
        let listed = call(MessageRequest::ListServices(String::new())).await?;
        let MessageResponse::ListServicesResponse(listed) = listed else {
            anyhow::bail!("{listed:?} is no list");
        };
        let names: Vec<String> = listed.service.into_iter().map(|service| service.name).collect();
        let mut pool = DescriptorPool::new();
        let mut wanted: Vec<MessageRequest> =
            names.iter().cloned().map(MessageRequest::FileContainingSymbol).collect();
        let mut files = std::collections::BTreeMap::new();
        while let Some(request) = wanted.pop() {
            let answer = call(request).await?;
            let MessageResponse::FileDescriptorResponse(answer) = answer else {
                anyhow::bail!("{answer:?} is no file");
            };
            for bytes in answer.file_descriptor_proto {
                let file = prost_reflect::prost_types::FileDescriptorProto::decode(bytes.as_slice())?;
                if !files.contains_key(file.name()) {
                    wanted.extend(file.dependency.iter().cloned().map(MessageRequest::FileByFilename));
                    files.insert(file.name().to_owned(), file);
                }
            }
        }
        pool.add_file_descriptor_protos(files.into_values())?;
        (names, pool)
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generic_client_does_the_main_job() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let service = Service::start().await?;
    let worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let (names, pool) = learn!(v1, service);
    let (alpha_names, alpha_pool) = learn!(v1alpha, service);
    for name in [
        "trailer.images.v1.ImageService",
        "trailer.images.v1.BuildService",
        "trailer.images.v1.ContextService",
        "trailer.images.v1.WorkerService",
        "trailer.dispatch.v1.DispatchService",
        "grpc.health.v1.Health",
    ] {
        assert!(names.iter().chain(&alpha_names).filter(|found| *found == name).count() == 2, "{name}");
    }
    let (worker_names, _) = learn!(v1, worker);
    assert!(worker_names.iter().any(|name| name == "grpc.health.v1.Health"));

    for pool in [pool, alpha_pool] {
        let token = service.token("alice", &[Role::Builder]);
        let client = Generic { pool, channel: channel(service.addr), token };
        let config = serde_json::json!({"dockerfile": {"text": "FROM scratch", "files": [{"path": "a", "content": "aGk="}]}});
        let image = serde_json::json!({"image": {"name": "Generic", "config": config}});
        let created = client.unary("trailer.images.v1.ImageService/CreateImage", image).await?;
        let (id, build) = (created["image"]["id"].clone(), created["build"]["id"].clone());
        let request = serde_json::json!({"id": build});
        let history = client.call("trailer.images.v1.BuildService/WatchBuild", request, |_| false).await?;
        let last = &history.last().context("messages")?["events"];
        let last = &last[last.as_array().context("events")?.len() - 1]["stateChange"];
        assert_eq!(last["imageStatus"], "IMAGE_STATUS_BUILD_FINISHED");
        let request = serde_json::json!({"view": "IMAGE_VIEW_FULL"});
        let watched = client
            .call("trailer.images.v1.ImageService/WatchImages", request, |message| {
                message.get("synced").is_some()
            })
            .await?;
        assert_eq!(watched.last().and_then(|message| message.get("synced")), Some(&serde_json::json!({})));
        assert_eq!(watched[0]["image"]["config"], config);
        client.unary("trailer.images.v1.ImageService/DeleteImage", serde_json::json!({"id": id})).await?;
        let health = client.unary("grpc.health.v1.Health/Check", serde_json::json!({})).await?;
        assert_eq!(health["status"], "SERVING");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_is_open_to_anyone_at_few_places() -> anyhow::Result<()> {
    /// Number of places, and of calls on a connection, which may have 16 without a token.
    const PLACES: usize = 64;
    const ON_ONE: usize = 8;
    let service = Service::start().await?;
    // A call lasts until the sender of its requests is dropped.
    let open = async |channel: Channel| {
        let (sender, requests) = mpsc::channel(1);
        let mut client = ServerReflectionClient::new(channel);
        let response = client.server_reflection_info(ReceiverStream::new(requests)).await?;
        Ok::<_, Status>((sender, response))
    };
    let mut calls = Vec::new();
    for _ in 0..PLACES / ON_ONE {
        let channel = channel(service.addr);
        for _ in 0..ON_ONE {
            calls.push(open(channel.clone()).await?);
        }
    }
    let refused = refused(open(channel(service.addr)).await.map(drop));
    assert_eq!(refused, (Code::ResourceExhausted, "TOO_MANY_STREAMS".to_owned()));
    // Health has places of its own.
    HealthClient::new(channel(service.addr)).check(HealthCheckRequest::default()).await?;
    drop(calls);
    eventually_true("there are places again", async || Ok(open(channel(service.addr)).await.is_ok())).await
}

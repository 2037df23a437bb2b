//! Compilation of the `.proto` files with protox, which needs no protoc.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;
use prost_build::{Service, ServiceGenerator};
use prost_types::{DescriptorProto, FieldOptions};

const FILES: [&str; 8] = [
    "trailer/dispatch/v1/dispatch_service.proto",
    "trailer/images/v1/access_service.proto",
    "trailer/images/v1/build.proto",
    "trailer/images/v1/build_service.proto",
    "trailer/images/v1/context_service.proto",
    "trailer/images/v1/image.proto",
    "trailer/images/v1/image_service.proto",
    "trailer/images/v1/worker_service.proto",
];

/// Directories of the Buf modules, which imports are relative to.
const MODULES: [&str; 3] = ["api", "dispatch", "vendor"];

fn main() -> Result<(), Box<dyn Error>> {
    for module in MODULES {
        println!("cargo:rerun-if-changed={module}");
    }
    let mut compiler = protox::Compiler::new(MODULES)?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(FILES)?;
    let mut files = compiler.file_descriptor_set();
    // Options are for readers and other languages: neither the generated code nor server reflection has them.
    let defines_options = |path: &str| {
        path.starts_with("buf/validate/")
            || path.starts_with("google/api/")
            || path.ends_with("/descriptor.proto")
    };
    files.file.retain(|file| !defines_options(file.name()));
    for file in &mut files.file {
        file.dependency.retain(|path| !defines_options(path));
        file.message_type.iter_mut().for_each(remove_unknown_options);
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptor_set.bin"), files.encode_to_vec())?;
    let services = tonic_prost_build::configure()
        .bytes(".")
        // Equal values have equal encodings, by which repeated requests are recognized.
        .btree_map(".")
        // Clients pass on many of these events, most of them small.
        .boxed(".trailer.images.v1.WatchImagesResponse.event.image")
        .boxed(".trailer.images.v1.WatchImagesResponse.event.changed")
        // Workers keep attempts in ordered maps.
        .type_attribute(".trailer.dispatch.v1.Attempt", "#[derive(PartialOrd, Ord)]")
        .extern_path(".google.rpc", "::tonic_types::pb")
        // The clients' `connect(endpoint)` would clash with the RPC `Connect`; clients are built from a
        // channel.
        .build_transport(false);
    let mut config = prost_build::Config::new();
    config.service_generator(Box::new(ClientsAndServers {
        clients: services.clone().build_server(false).service_generator(),
        servers: services.clone().build_client(false).codec_path("crate::codec::Codec").service_generator(),
    }));
    services.build_client(false).build_server(false).compile_fds_with_config(files, config)?;
    Ok(())
}

/// Removes options that have nothing but extensions, for which `prost_build` would not pack repeated fields.
fn remove_unknown_options(message: &mut DescriptorProto) {
    for field in &mut message.field {
        field.options.take_if(|options| *options == FieldOptions::default());
    }
    message.nested_type.iter_mut().for_each(remove_unknown_options);
}

/// A generator of clients and servers, which differ.
///
/// A server sends images that it has encoded once for many responses.
struct ClientsAndServers {
    clients: Box<dyn ServiceGenerator>,
    servers: Box<dyn ServiceGenerator>,
}

impl ServiceGenerator for ClientsAndServers {
    fn generate(&mut self, mut service: Service, code: &mut String) {
        self.clients.generate(service.clone(), code);
        for method in &mut service.methods {
            if ["GetImage", "ListImages", "WatchImages"].contains(&method.proto_name.as_str()) {
                method.output_type = format!("crate::codec::{}Response", method.proto_name);
            }
        }
        self.servers.generate(service, code);
    }
}

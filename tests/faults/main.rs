//! Tests that kill, stop and cut off the services, the engines and the database.
//!
//! Both services run as the programs that are shipped, and each worker has a Docker Engine of its own.
//! `stack` runs the services, `docker_engine` the engines and `postgres` a database server, each as a child
//! `process` of the test. The other modules are tests, named by subject. They need root, a dockerd and a
//! static busybox: see `tests/run`.

mod all_away;
#[path = "../e2e/answers.rs"]
#[expect(dead_code, reason = "the end-to-end tests use the rest")]
mod answers;
mod attacks;
#[path = "../e2e/authority.rs"]
mod authority;
mod away;
#[path = "../e2e/base_image.rs"]
mod base_image;
#[path = "../e2e/client.rs"]
#[expect(dead_code, reason = "the end-to-end tests use the rest")]
mod client;
mod cut_off;
mod docker_engine;
mod dockerd;
mod engine_failures;
#[path = "../e2e/eventually.rs"]
mod eventually;
mod full_disk;
mod kill;
#[path = "../e2e/otlp_collector.rs"]
#[expect(dead_code, reason = "the end-to-end tests use the rest")]
mod otlp_collector;
#[path = "../e2e/patience.rs"]
mod patience;
mod postgres;
mod process;
#[path = "../e2e/proxy.rs"]
mod proxy;
mod seven;
mod stack;
mod stalls;
mod two_engines;
mod uploads;

//! What dies, stalls and comes back: both services as the programs that are shipped, each worker with a Docker Engine of its
//! own, and a test that kills, stops and cuts them off.
//!
//! `stack` runs the services, `engine` the engines, `postgres` a database server, each a child `process` of the test. The other
//! modules are tests, named by what they are about. They need root, a dockerd and a static busybox: see `tests/run`.

mod all_away;
#[path = "../e2e/answers.rs"]
#[expect(dead_code, reason = "the end-to-end tests use the rest")]
mod answers;
mod away;
#[path = "../e2e/base_image.rs"]
mod base_image;
#[path = "../e2e/client.rs"]
#[expect(dead_code, reason = "the end-to-end tests use the rest")]
mod client;
#[path = "../e2e/collector.rs"]
#[expect(dead_code, reason = "the end-to-end tests use the rest")]
mod collector;
mod cut_off;
mod dockerd;
mod engine;
mod engines;
mod killed;
#[path = "../e2e/patience.rs"]
mod patience;
mod postgres;
mod process;
#[path = "../e2e/proxy.rs"]
mod proxy;
mod seven;
mod stack;
mod uploads;

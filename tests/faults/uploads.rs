//! Archives that are large, or would be when unpacked, and what they cost the service.

use std::{fs, path::Path};

use flate2::{Compression, write::GzEncoder};
use tonic::Code;

use crate::stack::{Service, directory};

const MIB: u64 = 1024 * 1024;

/// Writes a tar with one file of `size` bytes, whose content `content` writes.
fn tar_of(
    size: u64,
    mut into: impl std::io::Write,
    content: impl Fn(&mut dyn std::io::Write) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_path("file")?;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    into.write_all(header.as_bytes())?;
    content(&mut into)?;
    into.write_all(&[0; 1024])?;
    Ok(())
}

fn size_of(directory: &Path) -> anyhow::Result<u64> {
    let mut size = 0;
    for entry in fs::read_dir(directory)? {
        size += entry?.metadata()?.len();
    }
    Ok(size)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_takes_little_memory_however_large_it_is_or_would_be() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let data = directory.path().join("data");
    let mut small = Vec::new();
    tar_of(0, &mut small, |_| Ok(()))?;
    alice.upload("", &small).await?;
    let (memory, disk) = (service.program.peak_memory()?, size_of(&data)?);

    // 512 MiB that compress to half a MiB.
    let mut bomb = GzEncoder::new(Vec::new(), Compression::default());
    tar_of(512 * MIB, &mut bomb, |into| {
        let zeros = vec![0; MIB as usize];
        (0..512).try_for_each(|_| into.write_all(&zeros))
    })?;
    let bomb = bomb.finish()?;
    assert!(bomb.len() < MIB as usize);
    let refused = alice.upload("", &bomb).await.expect_err("too large when it is unpacked");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    assert!(
        service.program.peak_memory()? < memory + 64 * MIB,
        "{} upon {memory}",
        service.program.peak_memory()?
    );
    assert!(size_of(&data)? < disk + 8 * MIB, "{} upon {disk}", size_of(&data)?);

    // The largest size that is accepted, of incompressible data.
    let mut large = Vec::new();
    tar_of(100 * MIB, &mut large, |into| {
        let mut random = fastrand::Rng::with_seed(7);
        let mut noise = vec![0; MIB as usize];
        (0..100).try_for_each(|_| {
            random.fill(&mut noise);
            into.write_all(&noise)
        })
    })?;
    let taken = alice.upload("", &large).await?;
    assert_eq!(taken.size_bytes, i64::try_from(large.len())?);
    assert!(
        service.program.peak_memory()? < memory + 96 * MIB,
        "{} upon {memory}",
        service.program.peak_memory()?
    );
    Ok(())
}

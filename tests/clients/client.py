"""Lists, builds and watches with the generated stubs. Arguments: HOST:PORT TOKEN. Prints one JSON object."""

import json
import sys

import grpc

from trailer.images.v1 import build_pb2, build_service_pb2, build_service_pb2_grpc
from trailer.images.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc

LIMIT = 20  # seconds


def main(address, token):
    metadata = [("authorization", f"Bearer {token}")]
    channel = grpc.insecure_channel(address)
    images = image_service_pb2_grpc.ImageServiceStub(channel)
    builds = build_service_pb2_grpc.BuildServiceStub(channel)

    # The watch is open before anything happens.
    watch = images.WatchImages(image_service_pb2.WatchImagesRequest(), metadata=metadata, timeout=LIMIT)
    for event in watch:
        if event.WhichOneof("event") == "synced":
            break

    dockerfile = image_pb2.DockerfileSource(text="FROM scratch")
    image = image_pb2.Image(name="From Python", config=image_pb2.ImageConfig(dockerfile=dockerfile))
    request = image_service_pb2.CreateImageRequest(image=image)
    created = images.CreateImage(request, metadata=metadata, timeout=LIMIT)

    request = build_service_pb2.WatchBuildRequest(id=created.build.id)
    responses = builds.WatchBuild(request, metadata=metadata, timeout=LIMIT)
    kinds = {event.WhichOneof("event") for response in responses for event in response.events}

    for event in watch:
        if event.WhichOneof("event") == "changed":
            if event.changed.status == image_pb2.IMAGE_STATUS_BUILD_FINISHED:
                break
    watch.cancel()

    listed = images.ListImages(image_service_pb2.ListImagesRequest(), metadata=metadata, timeout=LIMIT)
    build = builds.GetBuild(build_service_pb2.GetBuildRequest(id=created.build.id), metadata=metadata, timeout=LIMIT)
    report = {
        "listed": [found.name for found in listed.images],
        "state": build_pb2.BuildState.Name(build.build.state),
        "events": sorted(kind for kind in kinds if kind),
    }
    print(json.dumps(report))


main(*sys.argv[1:])

// Lists, builds and watches with the generated stubs. Arguments: HOST:PORT TOKEN. Prints one JSON object.

import { createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

import { BuildState } from "./gen/typescript/trailer/images/v1/build_pb";
import { BuildService } from "./gen/typescript/trailer/images/v1/build_service_pb";
import { ImageStatus } from "./gen/typescript/trailer/images/v1/image_pb";
import { ImageService } from "./gen/typescript/trailer/images/v1/image_service_pb";

const [address, token] = process.argv.slice(2);
const authorize: Interceptor = (next) => (request) => {
  request.header.set("authorization", `Bearer ${token}`);
  return next(request);
};
const transport = createGrpcTransport({
  baseUrl: `http://${address}`,
  interceptors: [authorize],
  defaultTimeoutMs: 20_000,
});
const images = createClient(ImageService, transport);
const builds = createClient(BuildService, transport);

// The watch is open before anything happens.
const watch = images.watchImages({})[Symbol.asyncIterator]();
async function watched(wanted: (event: Awaited<ReturnType<typeof watch.next>>["value"]) => boolean): Promise<void> {
  for (;;) {
    const { done, value } = await watch.next();
    if (done) throw new Error("the watch ended");
    if (wanted(value)) return;
  }
}
await watched((response) => response.event.case === "synced");

const source = { case: "dockerfile" as const, value: { text: "FROM scratch" } };
const { build } = await images.createImage({ image: { name: "From TypeScript", config: { source } } });
if (build === undefined) throw new Error("no build");

const kinds = new Set<string>();
for await (const { events } of builds.watchBuild({ id: build.id })) {
  for (const { event } of events) if (event.case !== undefined) kinds.add(event.case);
}
await watched(
  ({ event }) => event.case === "changed" && event.value.status === ImageStatus.BUILD_FINISHED,
);
await watch.return?.();

const listed = await images.listImages({});
const finished = await builds.getBuild({ id: build.id });
console.log(
  JSON.stringify({
    listed: listed.images.map((image) => image.name),
    state: `BUILD_STATE_${BuildState[finished.build!.state]}`,
    events: [...kinds].sort(),
  }),
);
process.exit(0);

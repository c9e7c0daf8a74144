// What the tests call on the page. The page's own script is in index.html.

// Both are replaced by imports that suspend WebAssembly: see index.html.
export function pause() {
  throw new Error("pause() is called without JavaScript Promise Integration");
}

export function rest() {
  throw new Error("rest() is called without JavaScript Promise Integration");
}

export function number_of_histories() {
  return globalThis.histories;
}

export function failed(message) {
  globalThis.message = message;
}

// Buffers: how many bytes of them were created and not destroyed, and which ones are refused.
let live = 0;
let refused = "";
const createBuffer = GPUDevice.prototype.createBuffer;
GPUDevice.prototype.createBuffer = function (descriptor) {
  if (refused !== "" && descriptor.label?.includes(refused)) {
    return createBuffer.call(this, { ...descriptor, size: 2 ** 52 });
  }
  const buffer = createBuffer.call(this, descriptor);
  let size = descriptor.size;
  live += size;
  const destroy = buffer.destroy;
  buffer.destroy = function () {
    live -= size;
    size = 0;
    destroy.call(buffer);
  };
  return buffer;
};

export function live_bytes() {
  return live;
}

// From now on buffers with this text in their label are too large for any device; "" for none.
export function refuse_buffers(label) {
  refused = label;
}

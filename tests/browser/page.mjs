// What the tests call on the page. The page's own script is in index.html.

// Replaced by an import that suspends WebAssembly: see index.html.
export function pause() {
  throw new Error("pause() is called without JavaScript Promise Integration");
}

export function number_of_histories() {
  return globalThis.histories;
}

export function failed(message) {
  globalThis.message = message;
}

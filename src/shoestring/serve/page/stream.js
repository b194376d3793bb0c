// Talking to the server: one streamed chat completion, and whether the server is there.
export class Refused extends Error {
  constructor(message, status, wait) {
    super(message);
    this.status = status;
    this.wait = wait; // seconds, when the server says so
  }
}

const key = () => sessionStorage.getItem("shoestring.key") || "";
export const setKey = (value) => sessionStorage.setItem("shoestring.key", value.trim());
export const hasKey = () => Boolean(key());

const headers = () => ({ "content-type": "application/json", ...(key() ? { authorization: `Bearer ${key()}` } : {}) });

export async function getJSON(path) {
  const answer = await fetch(path, { headers: headers() });
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

export async function healthy() {
  try {
    return (await fetch("/health", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

async function refusal(answer) {
  let message = `The server answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    /* no JSON: the status says it */
  }
  return new Refused(message, answer.status, Number(answer.headers.get("retry-after")) || null);
}

// Calls `hear` with each chunk. Throws Refused for what the server says, TypeError when it is gone, AbortError on stop.
export async function stream(body, signal, hear) {
  const answer = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!answer.ok) throw await refusal(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new TypeError("the answer broke off");
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const document = JSON.parse(data);
      if (document.error) throw new Refused(document.error.message, 0, null);
      hear(document);
    }
  }
}

// The official Node client against a running server: `node check.mjs BASE_URL`. Exits with 1 at the first surprise.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is six times seven?" }];
const mrsa = { population: 4, rounds: 1, set_size: 2, seed: 7 };
const model = "scripted-mrsa";
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

const checks = {
  async "lists the models"() {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert.deepEqual(ids, ["scripted", model]);
    assert.equal((await client.models.retrieve(model)).id, model);
  },
  async "completes"() {
    const done = await client.chat.completions.create({ model, messages, mrsa });
    assert.match(done.choices[0].message.content, /boxed/);
    assert.equal(done.choices[0].finish_reason, "stop");
    assert.equal(done.usage.total_tokens, done.usage.prompt_tokens + done.usage.completion_tokens);
    assert.equal(done.mrsa.params.population, 4);
  },
  async "streams chunks"() {
    const stream = await client.chat.completions.create({
      model,
      messages,
      mrsa,
      stream: true,
      stream_options: { include_usage: true },
    });
    let content = "";
    let reasoning = "";
    let usage = null;
    const events = [];
    for await (const chunk of stream) {
      content += chunk.choices[0]?.delta.content ?? "";
      reasoning += chunk.choices[0]?.delta.reasoning ?? "";
      usage = chunk.usage ?? usage;
      if (chunk.mrsa) events.push(chunk.mrsa.event);
    }
    assert.match(content, /boxed/);
    assert.match(reasoning, /^\[round 0, rollout/);
    assert.ok(usage.completion_tokens > 0);
    assert.equal(events[0], "run.started");
    assert.equal(events.at(-1), "run.finished");
  },
  async "accumulates with .stream"() {
    const runner = client.chat.completions.stream({ model, messages, mrsa });
    let heard = "";
    runner.on("content", (delta) => (heard += delta));
    const done = await runner.finalChatCompletion();
    assert.equal(done.choices[0].message.content, heard);
    assert.match(heard, /boxed/);
  },
  async "calls a tool, streamed and not"() {
    const request = { model, messages, mrsa, tools, tool_choice: "required" };
    const done = await client.chat.completions.create(request);
    assert.equal(done.choices[0].finish_reason, "tool_calls");
    assert.equal(done.choices[0].message.tool_calls[0].function.name, "get_weather");
    const streamed = await client.chat.completions.stream(request).finalChatCompletion();
    assert.deepEqual(JSON.parse(streamed.choices[0].message.tool_calls[0].function.arguments), { city: "text" });
  },
  async "throws a typed error"() {
    await assert.rejects(client.chat.completions.create({ model: "other", messages }), OpenAI.NotFoundError);
    await assert.rejects(
      client.chat.completions.create({ model, messages, mrsa: { population: 0 } }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "mrsa.population" && !!error.requestID,
    );
  },
  async "aborts"() {
    const stream = await client.chat.completions.create({ model, messages, stream: true });
    for await (const chunk of stream) {
      assert.ok(chunk.choices);
      break;
    }
    stream.controller.abort();
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok ${name}`);
  } catch (error) {
    console.error(`not ok ${name}`, error);
    process.exit(1);
  }
}

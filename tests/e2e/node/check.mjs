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

const input = "What is six times seven?";
const [{ function: named }] = tools;
const flatTools = [{ type: "function", strict: false, ...named }];
const reasoning = { summary: "detailed" };

Object.assign(checks, {
  async "responds"() {
    const done = await client.responses.create({ model, input, mrsa });
    assert.match(done.output_text, /boxed/);
    assert.deepEqual(done.output.map((item) => item.type), ["reasoning", "message"]);
    assert.match(done.output[0].summary[0].text, /^\*\*Round 0 of 1\*\*/);
    assert.equal(done.usage.total_tokens, done.usage.input_tokens + done.usage.output_tokens);
    assert.equal(done.mrsa.params.population, 4);
  },
  async "streams a response, with events of ours where they are asked for"() {
    const stream = await client.responses.create({ model, input, mrsa, reasoning, include: ["mrsa.events"], stream: true });
    const types = [];
    let text = "";
    for await (const event of stream) {
      types.push(event.type);
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.match(text, /boxed/);
    assert.ok(types.includes("mrsa:round.finished"));
    assert.equal(types.at(-1), "response.completed");
  },
  async "accumulates a response with .stream"() {
    for (const extra of [{}, { reasoning }]) {
      const runner = client.responses.stream({ model, input, mrsa, ...extra });
      let heard = "";
      runner.on("response.output_text.delta", (event) => (heard += event.delta));
      const done = await runner.finalResponse();
      assert.equal(done.output_text, heard);
      assert.match(heard, /boxed/);
      assert.match(done.output[0].summary[0].text, /^\*\*Round 0 of 1\*\*/);
    }
  },
  async "calls a tool in a response, streamed and not, and reads what it returned"() {
    const request = { model, input, mrsa, tools: flatTools, tool_choice: "required" };
    const done = await client.responses.create(request);
    const call = done.output.at(-1);
    assert.deepEqual(JSON.parse(call.arguments), { city: "text" });
    const streamed = await client.responses.stream(request).finalResponse();
    assert.deepEqual(JSON.parse(streamed.output.at(-1).arguments), { city: "text" });
    const result = { type: "function_call_output", call_id: call.call_id, output: "sun" };
    const items = [{ role: "user", content: input }, ...done.output, result];
    assert.match((await client.responses.create({ model, input: items, mrsa, tools: flatTools })).output_text, /boxed/);
  },
  async "parses a response"() {
    const schema = { type: "object", properties: { result: { type: "integer" } }, required: ["result"] };
    const text = { format: { type: "json_schema", name: "out", schema, strict: true } };
    const done = await client.responses.parse({ model, input, mrsa, text });
    assert.deepEqual(JSON.parse(done.output_text), { result: 1 });
  },
  async "goes on with a response in the background where its stream was cut"() {
    const stream = await client.responses.create({ model, input, mrsa, reasoning, background: true, stream: true });
    const seen = [];
    for await (const event of stream) {
      seen.push(event);
      if (seen.length === 6) break;
    }
    const id = seen[0].response.id;
    const after = seen.at(-1).sequence_number;
    for await (const event of await client.responses.retrieve(id, { stream: true, starting_after: after })) seen.push(event);
    assert.deepEqual(seen.map((event) => event.sequence_number), seen.map((_, number) => number));
    const text = seen.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta).join("");
    assert.equal((await client.responses.retrieve(id)).output_text, text);
    assert.match(text, /boxed/);
    const whole = client.responses.stream({ response_id: id });
    assert.equal((await whole.finalResponse()).output_text, text);
  },
  async "cancels a response in the background"() {
    const large = { population: 8, rounds: 8, set_size: 2, tail_tokens: 8 };
    const { id } = await client.responses.create({ model, input, mrsa: large, background: true });
    assert.equal((await client.responses.cancel(id)).status, "cancelled");
  },
  async "throws what a response cannot be"() {
    await assert.rejects(
      client.responses.create({ model, input, background: true, store: false }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "background",
    );
    const late = { ...mrsa, deadline_s: 0.03 };
    await assert.rejects(client.responses.stream({ model, input, mrsa: late }).finalResponse(), OpenAI.APIError);
  },
});

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok ${name}`);
  } catch (error) {
    console.error(`not ok ${name}`, error);
    process.exit(1);
  }
}

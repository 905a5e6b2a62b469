// Calls by one library: node calls.mjs LIBRARY URL CALLS-AS-JSON, as calls.py; prints {text, usage, block} for each.
import OpenAI from "openai";
import { generateText, streamText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const QUESTION = "12+7*3-4";
const TEMPERATURE = 0.01; // a vote refuses 0, at which its samples would be equal
const TOKENS = 60;
const [library, url, calls] = process.argv.slice(2);

function result(text, usage, blocks, extra) {
  const said = JSON.stringify(blocks) ?? "";
  return { text, usage: Boolean(usage), block: Object.keys(extra).some((name) => said.includes(`"${name}"`)) };
}

async function openai(extra, stream) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
  const messages = [{ role: "user", content: QUESTION }];
  const body = { model: "demo", messages, temperature: TEMPERATURE, max_tokens: TOKENS, ...extra };
  if (!stream) {
    const reply = await client.chat.completions.create(body);
    return result(reply.choices[0].message.content, reply.usage, reply, extra);
  }
  const chunks = [];
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ ...body, ...options })) chunks.push(chunk);
  const text = chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join("");
  return result(text, chunks.find((chunk) => chunk.usage)?.usage, chunks, extra);
}

async function aiSdk(extra, stream) {
  const provider = createOpenAICompatible({ name: "emInf", baseURL: `${url}/v1`, apiKey: "unused", includeUsage: true });
  const call = { model: provider("demo"), prompt: QUESTION, temperature: TEMPERATURE, maxOutputTokens: TOKENS };
  const options = { ...call, maxRetries: 0, providerOptions: { emInf: extra } };
  if (!stream) {
    const reply = await generateText(options);
    return result(reply.text, reply.usage.outputTokens, reply.response.body, extra);
  }
  const streamed = streamText({ ...options, includeRawChunks: true });
  const raw = [];
  let text = "";
  for await (const part of streamed.fullStream) {
    if (part.type === "raw") raw.push(part.rawValue);
    if (part.type === "text-delta") text += part.text;
    if (part.type === "error") throw part.error;
  }
  return result(text, (await streamed.usage).outputTokens, raw, extra);
}

const send = { "openai for node": openai, "ai-sdk": aiSdk }[library];
for (const [extra, stream] of JSON.parse(calls)) {
  console.log(JSON.stringify(await send(extra, stream).catch((error) => ({ failed: String(error) }))));
}

// Clients for Node: openai's own, and Vercel's ai over both of its providers. Run where they are installed.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";
import fs from "node:fs";

const [folder, url, model, which] = process.argv.slice(2);
const require = createRequire(path.join(folder, "package.json"));
const load = async (name) => import(pathToFileURL(require.resolve(name)));
const version = (name) => JSON.parse(fs.readFileSync(path.join(folder, "node_modules", name, "package.json"))).version;
const FIRST = { role: "user", content: "Name a colour." };
const SECOND = { role: "user", content: "And another?" };

async function openaiChecks() {
  const { default: OpenAI } = await load("openai");
  const client = new OpenAI({ baseURL: url, apiKey: "none" });
  const asked = { model, max_tokens: 12 };
  const ask = (messages, more = {}) => client.chat.completions.create({ ...asked, messages, ...more });
  return {
    plain: async () => (await ask([FIRST], { store: false, tools: [] })).choices[0].message.content,
    history: async () => {
      const reply = (await ask([FIRST])).choices[0].message;
      const gathered = await client.chat.completions.stream({ ...asked, messages: [FIRST] }).finalMessage();
      const whole = { model, stop: ["e"], tools: [] }; // an answer that ends at its limit is an error there
      await client.chat.completions.runTools({ ...whole, messages: [FIRST, gathered, SECOND] }).finalContent();
      return (await ask([FIRST, reply, SECOND])).choices[0].message.content;
    },
    streaming: async () => {
      let text = "";
      for await (const chunk of await ask([FIRST], { stream: true })) text += chunk.choices[0]?.delta?.content ?? "";
      return text;
    },
  };
}

async function aiChecks(chat) {
  const { generateText, streamText } = await load("ai");
  const asked = { model: chat, maxOutputTokens: 12 };
  return {
    plain: async () => (await generateText({ ...asked, prompt: FIRST.content })).text,
    history: async () => {
      const { response } = await generateText({ ...asked, messages: [FIRST] });
      return (await generateText({ ...asked, messages: [FIRST, ...response.messages, SECOND] })).text;
    },
    streaming: async () => {
      let text = "";
      for await (const part of streamText({ ...asked, prompt: FIRST.content }).textStream) text += part;
      return text;
    },
  };
}

async function found() {
  if (which === "openai") return openaiChecks();
  const provider = await load(which);
  if (which === "@ai-sdk/openai") return aiChecks(provider.createOpenAI({ baseURL: url, apiKey: "none" }).chat(model));
  return aiChecks(provider.createOpenAICompatible({ name: "local", baseURL: url }).chatModel(model));
}

const results = { version: which === "openai" ? version(which) : `${version("ai")}, ${version(which)}` };
for (const [name, work] of Object.entries(await found())) {
  try {
    results[name] = (await work()) ? "works" : "nothing came";
  } catch (error) {
    console.error(error);
    results[name] = String(error).slice(0, 200);
  }
}
console.log(JSON.stringify(results));

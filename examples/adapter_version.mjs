// A second implementation of schemas/SPECIFICATION.md, without dependencies: it reads adapter.json 1.x, derives the OCI manifest
// whose digest is the version, and computes the fingerprint of a base. The functions use Web APIs only and run in a page, too;
// the command needs node 20:
//
//     node adapter_version.mjs SCHEMA FOLDER          print the digest of the version in FOLDER, and its OCI manifest
//     node adapter_version.mjs --fingerprint FOLDER   print the fingerprint of a base model in safetensors
//
// Exit 1 with a line `refused: CODE: REASON` for what the specification refuses: json, version, schema, files.

const MAJOR = 1, MINOR = 0;
const SCHEMA_ID = "urn:adapterhub:schema:adapter:";
const MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json";
const MODEL = "application/vnd.cncf.model.";
const utf8 = new TextEncoder();

export class Refused extends Error {
  constructor(code, reason) { super(`refused: ${code}: ${reason}`); this.code = code; }
}

export async function digestOf(bytes) {
  const hash = new Uint8Array(await globalThis.crypto.subtle.digest("SHA-256", bytes));
  return "sha256:" + [...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---- section 2: JSON

// Parse strict JSON: JSON.parse would take the last of two equal keys, and round integers.
export function parseJson(bytes) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch { throw new Refused("json", "not UTF-8"); }
  let at = 0;
  const fail = (reason) => { throw new Refused("json", `${reason} at ${at}`); };
  const token = (pattern) => {
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    if (match) at = pattern.lastIndex;
    return match && match[0];
  };
  const space = () => token(/[ \t\n\r]*/y);
  const punctuation = (mark) => { space(); if (text[at] !== mark) return false; at += 1; return true; };
  const string = () => {
    const raw = token(/"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/y);
    if (raw === null) fail("no string");
    const value = JSON.parse(raw);
    return value.isWellFormed() ? value : fail("half a surrogate pair");
  };
  const number = (raw) => {
    const value = Number(raw);
    if (!Number.isFinite(value)) fail("a number too large");
    if (/^-?[0-9]+$/.test(raw) && !Number.isSafeInteger(value) && String(value) !== raw) fail("an integer beyond 2^53 - 1");
    return value;
  };
  const value = (depth) => {
    space();
    if (text[at] === '"') return string();
    if (depth === 64 && (text[at] === "{" || text[at] === "[")) fail("nested too deep");
    if (punctuation("{")) {
      const object = new Map();
      for (let more = !punctuation("}"); more; more = punctuation(",") || (punctuation("}") ? false : fail("no , or }"))) {
        space();
        const key = string();
        if (object.has(key)) fail(`the key ${JSON.stringify(key)} twice`);
        if (!punctuation(":")) fail("no :");
        object.set(key, value(depth + 1));
      }
      return object;
    }
    if (punctuation("[")) {
      const list = [];
      for (let more = !punctuation("]"); more; more = punctuation(",") || (punctuation("]") ? false : fail("no , or ]"))) {
        list.push(value(depth + 1));
      }
      return list;
    }
    const word = token(/true|false|null/y);
    if (word !== null) return JSON.parse(word);
    const digits = token(/-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y);
    return digits === null ? fail("no value") : number(digits);
  };
  const document = value(0);
  space();
  if (at !== text.length) fail("more than one value");
  if (!(document instanceof Map)) throw new Refused("json", "not an object");
  return document;
}

// RFC 8785. The keys of a Map are sorted by UTF-16 units, which is the default order of `sort`.
export function canonical(value, indent = "", line = "\n") {
  const inner = line + indent, [start, end, space] = indent ? [inner, line, " "] : ["", "", ""];
  const join = (open, items, close) => (items.length ? open + start + items.join("," + start) + end + close : open + close);
  if (value instanceof Map) {
    const keys = [...value.keys()].sort();
    return join("{", keys.map((key) => `${JSON.stringify(key)}:${space}${canonical(value.get(key), indent, inner)}`), "}");
  }
  if (Array.isArray(value)) return join("[", value.map((item) => canonical(item, indent, inner)), "]");
  return JSON.stringify(value);
}

const map = (object) => new Map(Object.entries(object).filter(([, value]) => value !== undefined && value !== null));

// ---- section 3: the document

// The keywords of adapter.schema.json; values are those of parseJson, in the schema as in the document.
function accepts(value, schema, root) {
  const is = {
    null: value === null, boolean: typeof value === "boolean", string: typeof value === "string",
    number: typeof value === "number", integer: Number.isInteger(value), array: Array.isArray(value), object: value instanceof Map,
  };
  const keywords = {
    type: (names) => [names].flat().some((name) => is[name]),
    const: (constant) => constant === value,
    enum: (members) => members.includes(value),
    pattern: (pattern) => !is.string || new RegExp(pattern, "u").test(value),
    minLength: (limit) => !is.string || [...value].length >= limit,
    maxLength: (limit) => !is.string || [...value].length <= limit,
    minimum: (limit) => !is.number || value >= limit,
    maximum: (limit) => !is.number || value <= limit,
    exclusiveMinimum: (limit) => !is.number || value > limit,
    required: (keys) => !is.object || keys.every((key) => value.has(key)),
    propertyNames: (rule) => !is.object || [...value.keys()].every((key) => accepts(key, rule, root)),
    items: (rule) => !is.array || value.every((item) => accepts(item, rule, root)),
    uniqueItems: () => !is.array || new Set(value).size === value.length,
    anyOf: (rules) => rules.some((rule) => accepts(value, rule, root)),
    $ref: (target) => accepts(value, root.get("$defs").get(target.slice("#/$defs/".length)), root),
    additionalProperties: (rule) => !is.object || [...value].every(([key, item]) => {
      const known = schema.get("properties")?.get(key);
      return known ? accepts(item, known, root) : rule instanceof Map ? accepts(item, rule, root) : rule;
    }),
    properties: (rules) => schema.has("additionalProperties") || !is.object ||
      [...value].every(([key, item]) => !rules.has(key) || accepts(item, rules.get(key), root)),
  };
  const notes = ["$schema", "$id", "$defs", "title", "description", "examples"];
  return [...schema].every(([keyword, argument]) => notes.includes(keyword) || keywords[keyword](argument));
}

// What a reader of a newer minor version ignores: the fields of closed objects that the schema does not list.
function withoutUnknown(value, schema) {
  if (Array.isArray(value) && schema.has("items")) return value.map((item) => withoutUnknown(item, schema.get("items")));
  if (!(value instanceof Map)) return value;
  const rest = schema.has("additionalProperties") ? schema.get("additionalProperties") : true;
  const rule = (key) => schema.get("properties")?.get(key) ?? rest;
  return new Map([...value].filter(([key]) => rule(key) !== false)
    .map(([key, item]) => [key, rule(key) instanceof Map ? withoutUnknown(item, rule(key)) : item]));
}

// Return the checked document, as one of this version.
export function readDocument(bytes, schema) {
  let document = parseJson(bytes);
  const version = document.get("schema_version");
  const [, major, minor] = /^(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})$/.exec(version) ?? [];
  if (major === undefined || typeof version !== "string") throw new Refused("version", `${version} is not major.minor`);
  if (Number(major) !== MAJOR) throw new Refused("version", `${version} is not ${MAJOR}.x`);
  if (Number(minor) > MINOR) {
    if (document.get("$schema") !== SCHEMA_ID + version) throw new Refused("schema", "$schema is of another version");
    document = withoutUnknown(document, schema);
    document.set("schema_version", `${MAJOR}.${MINOR}`).set("$schema", `${SCHEMA_ID}${MAJOR}.${MINOR}`);
  }
  if (!accepts(document, schema, schema)) throw new Refused("schema", "does not conform to the schema");
  const paths = document.get("files").map((entry) => entry.get("path"));
  checkPaths(["adapter.json", ...paths]);
  return document;
}

// ---- section 4: files

// Characters without a shape, and letters, marks and symbols that have none either.
const INVISIBLE = new RegExp("[\\p{Cc}\\p{Cf}\\p{Zl}\\p{Zp}\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u2800\\u3164\\ufe00-\\ufe0f" +
  "\\uffa0\\u{e0100}-\\u{e01ef}]", "u");
const DEVICES = /^(?:con|prn|aux|nul|com[0-9]|lpt[0-9])$/i;

// Full case folding of each character (D145), made of the mappings at hand; a dotless i alone would become another letter.
const folded = (char) => (char === "\u0131" ? char : char.toLowerCase().toUpperCase().toLowerCase());
const caseless = (path) => [...path.normalize("NFD")].map(folded).join("").normalize("NFD");

function checkPaths(paths) {
  const seen = new Map();
  for (const path of paths) {
    const parts = path.split("/");
    const safe = (part) => part !== "" && [...part].length <= 255 && !/[\u0000-\u001f/\\:*?"<>|%\u007f]|^[. ]|[. ]$/.test(part) &&
      !DEVICES.test(part.split(".")[0]);
    if ([...path].length > 1024 || parts.length > 32 || !parts.every(safe) || INVISIBLE.test(path)) {
      throw new Refused("files", `${JSON.stringify(path)} is no safe path`);
    }
    parts.forEach((_, index) => {
      const prefix = parts.slice(0, index + 1).join("/"), isFile = index + 1 === parts.length;
      const key = caseless(prefix), earlier = seen.get(key);
      if (earlier && (isFile || earlier.isFile || earlier.prefix !== prefix)) throw new Refused("files", `${path} collides`);
      seen.set(key, { prefix, isFile });
    });
  }
}

export function mediaType(path) {
  const name = path.slice(path.lastIndexOf("/") + 1), dot = name.lastIndexOf(".");
  const suffix = dot > 0 ? name.slice(dot).toLowerCase() : "";
  if ([".safetensors", ".gguf"].includes(suffix)) return MODEL + "weight.v1.raw";
  const forPeople = /^(?:LICENSE|LICENCE|NOTICE|COPYING|README)/.test(name.toUpperCase()); // codespell:ignore
  const isConfig = [".json", ".toml", ".jinja", ".model", ".txt"].includes(suffix) && !forPeople;
  return MODEL + (isConfig ? "weight.config.v1.raw" : "doc.v1.raw");
}

// Compare texts by code points, which is the order of their UTF-8 bytes.
function byCodePoint([leftText], [rightText]) {
  const left = utf8.encode(leftText), right = utf8.encode(rightText);
  for (let at = 0; at < Math.min(left.length, right.length); at += 1) if (left[at] !== right[at]) return left[at] - right[at];
  return left.length - right.length;
}

// ---- section 5: the OCI manifest, by rule 2

function paramSize(count) {
  const digits = BigInt(count).toString();
  const power = Math.min(Math.max(Math.floor((digits.length - 1) / 3), 1), 4);
  const padded = digits.padStart(3 * power + 1, "0"), point = padded.length - 3 * power;
  const fraction = padded.slice(point).replace(/0+$/, "");
  return padded.slice(0, point) + (fraction ? `.${fraction}` : "") + "KMBT"[power - 1];
}

const PRECISIONS = {
  F64: "float64", F32: "float32", F16: "float16", BF16: "bfloat16", F8_E4M3: "float8_e4m3fn", F8_E5M2: "float8_e5m2",
  I8: "int8", U8: "uint8",
};

// Return { digest, manifest, config }, the latter two as text; `files` maps each path to { digest, size }.
export async function derive(files, document) {
  const base = document.get("base"), training = document.get("training"), text = (value) => value || undefined;
  const layers = [...files].sort(byCodePoint).map(([path, { digest, size }]) => map({
    mediaType: mediaType(path), digest, size,
    annotations: map({ "org.opencontainers.image.title": path, "org.cncf.model.filepath": path }),
  }));
  const dtype = document.get("dtype"), license = text(document.get("license"));
  const config = canonical(map({
    descriptor: map({
      createdAt: text(training?.get("created")), family: text(base.get("model_type")), name: text(document.get("name")),
      description: text(document.get("description")), licenses: license && [license],
    }),
    config: map({
      format: document.get("format") === "gguf" ? "gguf" : "safetensors", paramSize: paramSize(document.get("parameters")),
      precision: text(dtype === "mixed" ? undefined : PRECISIONS[dtype] ?? dtype.toLowerCase()),
    }),
    modelfs: map({ type: "layers", diffIds: layers.map((layer) => layer.get("digest")) }),
  }));
  const parents = document.get("parents");
  const manifest = canonical(map({
    schemaVersion: 2, mediaType: MANIFEST_TYPE, artifactType: MODEL + "manifest.v1+json",
    config: map({
      mediaType: MODEL + "config.v1+json", digest: await digestOf(utf8.encode(config)), size: utf8.encode(config).length,
    }),
    layers,
    annotations: map({
      "io.adapterhub.kind": text(document.get("method")), "io.adapterhub.base.repo": text(base.get("repo")),
      "io.adapterhub.base.revision": text(base.get("revision")), "io.adapterhub.base.fingerprint": text(base.get("fingerprint")),
      "io.adapterhub.parents": parents.length ? canonical(parents) : undefined, "io.adapterhub.rule": "2",
    }),
  }));
  return { digest: await digestOf(utf8.encode(manifest)), manifest, config };
}

// Return what `derive` does for the files of a folder: a map from path to bytes, adapter.json included.
export async function readVersion(contents, schema) {
  if (!contents.has("adapter.json")) throw new Refused("files", "adapter.json is missing");
  const document = readDocument(contents.get("adapter.json"), schema);
  const files = new Map();
  for (const [path, bytes] of contents) files.set(path, { digest: await digestOf(bytes), size: bytes.length });
  for (const entry of document.get("files")) {
    const file = files.get(entry.get("path"));
    if (!file) throw new Refused("files", `${entry.get("path")} is missing`);
    if (file.digest !== entry.get("digest") || file.size !== entry.get("size")) {
      throw new Refused("files", `${entry.get("path")} has other bytes than adapter.json records`);
    }
  }
  if (files.size !== document.get("files").length + 1) throw new Refused("files", "a file is not recorded");
  return derive(files, document);
}

// ---- section 6: the fingerprint of a base, by the rule shapes-1

// `config` is its config.json, `shards` are the bytes of its safetensors files.
export async function fingerprint(config, shards) {
  const shapes = new Map();
  for (const bytes of shards) {
    const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
    const header = parseJson(bytes.subarray(8, 8 + length));
    header.delete("__metadata__");
    for (const [name, tensor] of header) {
      const state = /^(.*)\.quant_state\.bitsandbytes__(?:nf4|fp4)$/.exec(name);
      if (state) {
        const [from, to] = tensor.get("data_offsets").map((offset) => 8 + length + offset);
        shapes.set(state[1], parseJson(bytes.subarray(from, to)).get("shape"));
      } else if (!shapes.has(name)) shapes.set(name, tensor.get("shape"));
    }
    for (const name of header.keys()) {
      const state = /^(.*)\.quant_state\.bitsandbytes__(?:nf4|fp4)$/.exec(name);
      if (!state) continue;
      for (const suffix of ["absmax", "quant_map", "nested_absmax", "nested_quant_map"]) shapes.delete(`${state[1]}.${suffix}`);
    }
  }
  const section = config.get("text_config") ?? config.get("thinker_config")?.get("text_config");
  const tied = Boolean((config.has("tie_word_embeddings") ? config : section)?.get("tie_word_embeddings"));
  const lines = [...shapes].sort(byCodePoint)
    .filter(([name]) => !name.endsWith(".rotary_emb.inv_freq") && !(tied && name === "lm_head.weight"))
    .map(([name, shape]) => `${name}\t${shape.join(",")}\n`);
  return digestOf(utf8.encode(lines.join("")));
}

// ---- the command

export async function command([first, folder]) {
  const { readdirSync, readFileSync } = await import("node:fs");
  const bytes = (path) => new Uint8Array(readFileSync(path));
  if (first === "--fingerprint") {
    const shards = readdirSync(folder).filter((name) => name.endsWith(".safetensors")).map((name) => bytes(`${folder}/${name}`));
    return fingerprint(parseJson(bytes(`${folder}/config.json`)), shards);
  }
  const names = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile())
    .map((entry) => `${entry.parentPath ?? entry.path}/${entry.name}`.slice(folder.length + 1));
  const contents = new Map(names.map((name) => [name, bytes(`${folder}/${name}`)]));
  const { digest, manifest } = await readVersion(contents, parseJson(bytes(first)));
  return `${digest}\n${manifest}`;
}

if (globalThis.process?.argv[1] && import.meta.url === new URL(`file://${globalThis.process.argv[1]}`).href) {
  try {
    console.log(await command(globalThis.process.argv.slice(2)));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    console.error(error.message);
    globalThis.process.exitCode = 1;
  }
}

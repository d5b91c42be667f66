// Reference of the HTTP API, rendered from /openapi.json. Works offline; sends no other request.

const METHODS = ["get", "post", "delete"];

/** Creates an element with children; strings become text, never markup. */
function element(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const idOf = (method, path) => `${method}-${path.replace(/\W+/g, "-")}`;

function endpointsOf(schema) {
  return Object.entries(schema.paths).flatMap(([path, methods]) =>
    METHODS.filter((method) => method in methods).map((method) => ({ method, path, ...methods[method] })),
  );
}

function resolve(schema, node) {
  if (!node?.$ref) return node ?? {};
  return node.$ref.slice(2).split("/").reduce((part, key) => part[key], schema);
}

/** The type of a field in words, such as `integer, 1 to 1000` or `"png" | "jpeg"`. */
function typeText(field) {
  const choices = (field.anyOf ?? [field]).filter(({ type }) => type !== "null");
  return choices.map(choiceText).join(" | ");
}

function choiceText(field) {
  if (field.enum) return field.enum.map((value) => JSON.stringify(value)).join(" | ");
  const name = field.type === "array" ? `array of ${choiceText(field.items ?? {})}` : (field.type ?? "object");
  const low = field.minimum ?? field.exclusiveMinimum;
  const range = low !== undefined && field.maximum !== undefined ? `, ${low} to ${field.maximum}` : "";
  return name + range;
}

function fieldRow(name, field, required) {
  const fallback = field.default === undefined || field.default === null ? "" : JSON.stringify(field.default);
  return element("tr", {},
    element("td", {}, element("code", {}, name), required ? element("small", {}, " required") : ""),
    element("td", {}, element("span", { class: "type" }, typeText(field)), fallback && element("small", {}, ` · default ${fallback}`),
      field.description ? element("div", {}, field.description) : ""),
  );
}

function table(caption, rows) {
  return element("table", { "aria-label": caption }, element("tbody", {}, ...rows));
}

function bodyTable(schema, endpoint) {
  const [[type, content] = []] = Object.entries(endpoint.requestBody?.content ?? {});
  const body = resolve(schema, content?.schema);
  if (!body.properties) return "";
  const rows = Object.entries(body.properties).map(([name, field]) =>
    fieldRow(name, resolve(schema, field), body.required?.includes(name)));
  return element("div", {}, element("p", {}, "Body: ", element("code", {}, type)), table("Fields", rows));
}

function section(schema, endpoint) {
  const { method, path, description = "", parameters = [] } = endpoint;
  const rows = parameters.map(({ name, schema: field, required }) => fieldRow(name, field, required));
  return element("section", { id: idOf(method, path) },
    element("h2", {}, element("code", {}, `${method.toUpperCase()} ${path}`)),
    element("p", {}, description),
    rows.length ? table("Parameters", rows) : "",
    bodyTable(schema, endpoint),
  );
}

async function show() {
  const response = await fetch("/openapi.json");
  if (!response.ok) throw new Error(`The server responded with ${response.status}`);
  const schema = await response.json();
  const endpoints = endpointsOf(schema);
  document.getElementById("version").textContent = `sdrt ${schema.info.version}`;
  document.getElementById("contents").append(element("ul", {}, ...endpoints.map(({ method, path }) =>
    element("li", {}, element("a", { href: `#${idOf(method, path)}` }, `${method.toUpperCase()} ${path}`)))));
  document.getElementById("endpoints").append(...endpoints.map((endpoint) => section(schema, endpoint)));
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

show().catch((error) => {
  document.getElementById("error").textContent = `Cannot load the API description: ${error.message}`;
});

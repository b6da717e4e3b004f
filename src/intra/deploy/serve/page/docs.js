// /openapi.json for people, without anything from elsewhere.

const $ = (id) => document.getElementById(id);
const node = (tag, text, kind) => Object.assign(document.createElement(tag), { textContent: text ?? "", className: kind ?? "" });

try {
  const spec = await (await fetch("/openapi.json")).json();
  $("summary").textContent = `${spec.info.summary} Version ${spec.info.version}.`;
  $("example").textContent = `curl --data-binary @photo.png ${location.origin}/inspect`;
  for (const [path, methods] of Object.entries(spec.paths)) {
    for (const [method, route] of Object.entries(methods)) $("routes").append(section(spec, path, method, route));
  }
  document.body.classList.add("ready");
} catch {
  $("notice").textContent = "The server does not answer.";
  $("notice").hidden = false;
}

function section(spec, path, method, route) {
  const card = node("section", "", "card"), title = card.appendChild(node("h2"));
  title.append(node("span", method.toUpperCase(), "method"), node("code", path));
  card.append(node("p", route.summary));
  if (route.description) card.append(node("p", route.description));
  if (route.requestBody) card.append(node("h3", "Body"), node("p", `${route.requestBody.description} As: ${Object.keys(route.requestBody.content).join(", ")}.`));
  if (route.parameters) {
    card.append(node("h3", "Parameters"), list(route.parameters.map((each) => [
      each.name, [each.description, "default" in each.schema ? `Default: ${JSON.stringify(each.schema.default)}.` : ""].filter(Boolean).join(" ") || kind(each.schema)])));
  }
  card.append(node("h3", "Answers"), list(Object.entries(route.responses).flatMap(([status, answer]) => {
    const [type, content] = Object.entries(answer.content ?? {})[0] ?? [];
    const name = content?.schema?.$ref?.split("/").at(-1);
    return [[status, `${answer.description ?? ""} ${name ?? type ?? ""}`]];
  })));
  const good = Object.values(route.responses["200"]?.content ?? {})[0]?.schema?.$ref?.split("/").at(-1);
  if (good) {
    const fields = spec.components.schemas[good].properties;
    card.append(node("h3", good), list(Object.entries(fields).map(([name, schema]) => [name, `${kind(schema)}${schema.description ? ` – ${schema.description}` : ""}`])));
  }
  return card;
}

function list(pairs) {
  const out = document.createElement("dl");
  for (const [name, text] of pairs) out.append(node("dt", name), node("dd", text));
  return out;
}

function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  return schema.type ?? "";
}

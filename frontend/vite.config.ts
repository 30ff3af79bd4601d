import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type Plugin } from "vite";

const LICENSE = `/*! Sources: frontend/ of prm_search (Apache-2.0). Contains d3-hierarchy: ${readFileSync("node_modules/d3-hierarchy/LICENSE", "utf8")
  .trim()
  .replace(/\s+/g, " ")} */`;

/** The digest of everything that the assets are made of, as tests/test_frontend.py computes it too. */
function digest(): string {
  const files = ["package-lock.json", "package.json", "tsconfig.json", "vite.config.ts"]
    .concat(readdirSync("src").map((name) => join("src", name)))
    .sort();
  const hash = createHash("sha256");
  for (const name of files) hash.update(name).update("\0").update(readFileSync(name)).update("\0");
  return hash.digest("hex");
}

function stamp(): Plugin {
  return {
    name: "stamp",
    generateBundle(_, bundle) {
      for (const file of Object.values(bundle)) if (file.type === "chunk") file.code = `${LICENSE}\n${file.code}`;
      this.emitFile({ type: "asset", fileName: "sources.sha256", source: `${digest()}\n` });
    },
  };
}

export default defineConfig({
  plugins: [stamp()],
  build: {
    outDir: process.env.OUT ?? "../prm_search/viewer/static",
    emptyOutDir: true,
    target: "es2022",
    cssTarget: ["chrome123", "firefox121", "safari17.5"], // which know light-dark()
    modulePreload: false,
    cssCodeSplit: false,
    lib: { entry: "src/main.ts", formats: ["iife"], name: "viewer", fileName: () => "viewer.js", cssFileName: "viewer" },
  },
});

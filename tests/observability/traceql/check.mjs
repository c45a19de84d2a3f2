// Parses every argument as TraceQL, with the grammar that Grafana's editor uses. Prints what does not parse, and fails then.
import { parser } from "@grafana/lezer-traceql";

let failed = 0;
for (const query of process.argv.slice(2)) {
  parser.parse(query).iterate({
    enter(node) {
      if (node.type.isError) {
        console.log(`column ${node.from + 1} of: ${query}`);
        failed = 1;
      }
    },
  });
}
process.exit(failed);

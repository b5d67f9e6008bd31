import type { Command } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import { type CommonOptions, withExamples, withFormat } from "./options.ts";
import { endProgress, printJson, printProgress, printStderr, printStdout } from "./output.ts";

/** Registers `pack`: writes a plan, rankc and Node into one archive. */
export function registerPack(program: Command): void {
  withExamples(
    withFormat(program.command("pack").description("pack a plan, rankc and Node into one archive for machines without Node"))
      .argument("<plan>", "a plan (its directory or plan.json)")
      .requiredOption("-o, --out <file>", "the archive to write, a .tar.xz")
      .option(
        "--data-dir <dir>",
        "include the corpus; the base directory of data.path and data.labels (default: the directory of the job, which a plan remembers, if the files there are small)",
      )
      .option("--platform <platform>", "the operating system and processor, in Node's names (default: those of this machine)"),
    "pack plan/ -o tiny.tar.xz",
    "pack plan/ -o tiny.tar.xz --data-dir . --platform linux-x64",
  ).action(async (plan: string, options: Pick<CommonOptions, "format"> & { out: string; dataDir?: string; platform?: string }) => {
    const [{ pack }, { bytesText, plural }] = await Promise.all([import("./archive.ts"), import("../units.ts")]);
    const { format, ...settings } = options;
    const other = /\.(zst|gz|tgz|bz2|zip|7z)$/i.exec(options.out);
    if (other)
      throw new Trouble(
        `pack writes .tar.xz, and ${options.out} ends with ${other[0]}`,
        `write ${options.out.replace(/(\.tar)?\.\w+$/, "")}.tar.xz`,
      );
    let shown = -1;
    const onProgress = (files: number, of: number): void => {
      const tenth = Math.floor((10 * files) / of);
      if (tenth > shown) printProgress(`packing: ${files} of ${of} files`);
      shown = Math.max(shown, tenth);
    };
    const packed = await pack({ plan, ...settings, onProgress });
    endProgress();
    if (format === "json") return printJson(packed);
    printStdout(
      `${packed.out}: ${bytesText(packed.bytes)}, ${plural(packed.files, "file")}, for ${packed.platform}\nsha256 ${packed.sha256}`,
    );
    if (packed.corpus === undefined)
      printStderr("the archive has no corpus: pass --data-dir to rankc run on the host, or to rankc pack here");
  });
}

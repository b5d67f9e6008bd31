/** NVRTC: compiles CUDA C++ at run time. */
import { Trouble } from "../../schemas/trouble.ts";
import { koffi, openLibrary } from "./libraries.ts";

type Compiler = ReturnType<typeof openCompiler>;
let opened: Compiler | undefined;
const compiler = (): Compiler => (opened ??= openCompiler());

function openCompiler() {
  const { path, handle } = openLibrary("nvrtc");
  const bind = (name: string, ...params: string[]) => handle.func(name, "int", params);
  const { pointer } = koffi();
  return {
    path,
    version: bind("nvrtcVersion", "void *", "void *"),
    create: bind("nvrtcCreateProgram", "void *", "void *", "str", "int", "void *", "void *"),
    compile: handle.func("nvrtcCompileProgram", "int", ["void *", "int", pointer("str")]),
    destroy: bind("nvrtcDestroyProgram", "void *"),
    error: handle.func("nvrtcGetErrorString", "str", ["int"]),
    outputs: {
      log: { size: bind("nvrtcGetProgramLogSize", "void *", "void *"), get: bind("nvrtcGetProgramLog", "void *", "void *") },
      cubin: { size: bind("nvrtcGetCUBINSize", "void *", "void *"), get: bind("nvrtcGetCUBIN", "void *", "void *") },
      ptx: { size: bind("nvrtcGetPTXSize", "void *", "void *"), get: bind("nvrtcGetPTX", "void *", "void *") },
    },
  };
}

/** Returns the version, e.g. "13.0", and the path of the library. */
export function nvrtcVersion(): { readonly version: string; readonly path: string } {
  const nvrtc = compiler();
  const [major, minor] = [new Int32Array(1), new Int32Array(1)];
  check(nvrtc, "nvrtcVersion", nvrtc.version(major, minor));
  return { version: `${major[0]}.${minor[0]}`, path: nvrtc.path };
}

/**
 * The sources contain device code only. nvcc gives a lambda the execution space of the enclosing function; NVRTC 13.0 does not do so for
 * generic lambdas, and without this option rejects them as host functions.
 */
const DEVICE_CODE = "--device-as-default-execution-space";

/** Values of nvrtcResult: an invalid option (of ours only the architecture can be unknown), and an error in the source. */
const [INVALID_OPTION, COMPILATION] = [5, 6];

/** Options of `compile`. */
export type CompileOptions = {
  /** sm_… compiles to a cubin, compute_… to PTX. */
  readonly arch: string;
  /** The name of the source in messages. */
  readonly name: string;
  readonly options?: readonly string[];
};

/** Compiles a source. Throws an error with the compiler's log, in which each message has its line and a caret below its column. */
export function compile(source: string, options: CompileOptions): Uint8Array {
  const task = begin(source, options);
  try {
    return task.result(compiler().compile(task.program, task.options.length, task.options));
  } finally {
    task.end();
  }
}

/** Like `compile`, but in another thread, so that several compile at the same time. */
export async function compileBeside(source: string, options: CompileOptions): Promise<Uint8Array> {
  const task = begin(source, options);
  try {
    const code = await new Promise<number>((done, failed) =>
      compiler().compile.async(task.program, task.options.length, task.options, (error: unknown, result: number) =>
        error ? failed(error) : done(result),
      ),
    );
    return task.result(code);
  } finally {
    task.end();
  }
}

function begin(source: string, { arch, name, options: own = [] }: CompileOptions) {
  const nvrtc = compiler();
  const into = new BigUint64Array(1);
  check(nvrtc, "nvrtcCreateProgram", nvrtc.create(into, Buffer.from(`${source}\0`), name, 0, null, null));
  const [program = 0n] = into;
  return {
    program,
    options: [`--gpu-architecture=${arch}`, DEVICE_CODE, ...own],
    result(code: number): Uint8Array {
      if (code === INVALID_OPTION || code === COMPILATION) {
        const log = Buffer.from(output(nvrtc, "log", program))
          .toString()
          .replace(/\0$/, "")
          .trimEnd();
        const message = `NVRTC ${nvrtcVersion().version} cannot compile ${name} for ${arch}:\n${log}`;
        throw code === COMPILATION
          ? new Error(message)
          : new Trouble(message, "use an NVRTC that knows this architecture: RANKC_LIBNVRTC names its file", 3);
      }
      check(nvrtc, "nvrtcCompileProgram", code);
      return output(nvrtc, arch.startsWith("sm_") ? "cubin" : "ptx", program);
    },
    end: (): void => void nvrtc.destroy(into),
  };
}

function output(nvrtc: Compiler, kind: keyof Compiler["outputs"], program: bigint): Uint8Array {
  const { size, get } = nvrtc.outputs[kind];
  const bytes = new BigUint64Array(1);
  check(nvrtc, `the size of the ${kind}`, size(program, bytes));
  const into = new Uint8Array(Number(bytes[0]));
  check(nvrtc, `the ${kind}`, get(program, into));
  return into;
}

function check(nvrtc: Compiler, call: string, code: number): void {
  if (code !== 0) throw new Error(`${call}: ${nvrtc.error(code)} (${nvrtc.path})`);
}

/** The version of rankc, part of every plan's toolchain section; a test holds it equal to package.json's. */
export const version = "0.1.0";

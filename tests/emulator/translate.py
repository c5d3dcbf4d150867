#!/usr/bin/env python3
"""Rewrites a CUDA source as C++ for the emulator: translate.py INPUT OUTPUT

What C++ cannot say becomes calls of the runtime:
    kernel<<<grid, block, bytes, stream>>>(a, b)         emulator::launch("kernel", address, grid, block, bytes, stream, [&] { kernel(a, b); })
    __shared__ float x[32], y;                           references to memory of the running block
    extern __shared__ float x[];                         a pointer to the launch's dynamic shared memory
    __global__ void __launch_bounds__(N, M) kernel(...)  a check of the block's size, as the kernel's first statement
    asm("ex2.approx.ftz.f32 %0, %1;" : ...)              a function named after the instruction: ptx_ex2_approx_ftz_f32(y, x)
Everything else is C++ already, or declared in device.h. What is not understood here is an error, never passed over. Lines keep their numbers, so that compilers and
sanitizers name those of the CUDA source.
"""
import os
import re
import sys
from typing import NoReturn

CLOSING = {"(": ")", "[": "]", "{": "}"}
COMMENT_OR_LITERAL = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.S)
TEMPLATE_KERNEL = re.compile(r"template\s*<[^;{]*?>\s*(?:static\s+)?__global__\s+void\s+(?:__launch_bounds__\s*\([^;{]*?\)\s*)?(\w+)\s*\(")
DECLARATOR = r"(\w+)\s*((?:\[[^\]]*\]\s*)*)"


def give_up(what: str) -> NoReturn:
    sys.exit(f"translate.py: {sys.argv[1]}: not understood: {what}")


def code_of(text: str) -> str:
    """The text with comments and the insides of literals blanked, character for character: where searches find code and nothing else."""
    def blank(found: re.Match) -> str:
        it = found[0]
        return it[0] + "_" * (len(it) - 2) + it[-1] if it[0] in "\"'" else re.sub(r"[^\n]", " ", it)
    return COMMENT_OR_LITERAL.sub(blank, text)


def after_bracket(code: str, at: int) -> int:
    """The position after the bracket that closes the one at `at`."""
    opening, depth = code[at], 0
    while True:
        depth += (code[at] == opening) - (code[at] == CLOSING[opening])
        at += 1
        if depth == 0:
            return at


def split_list(text: str) -> list[str]:
    """Parts between the commas that are outside all brackets, those of templates included."""
    parts, depth, begin = [], 0, 0
    for at, c in enumerate(text):
        if c in "([{<":
            depth += 1
        elif c in ")]}" or (c == ">" and text[at - 1] != "-"):
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    return [part.strip() for part in parts + [text[begin:]]]


def replaced(text: str, begin: int, end: int, by: str) -> str:
    return text[:begin] + by + "\n" * (text.count("\n", begin, end) - by.count("\n")) + text[end:]


# In each of these the last occurrence comes first, so that what was found before it stays where it was found.

def check_launch_bounds(text: str) -> str:
    code = code_of(text)
    for found in reversed(list(re.finditer(r"__global__\s+void\s+__launch_bounds__\s*\(", code))):
        after_bounds = after_bracket(code, found.end() - 1)
        body = after_bracket(code, code.index("(", after_bounds))
        while code[body].isspace():
            body += 1
        if code[body] == "{":                   # else a declaration
            most = split_list(text[found.end():after_bounds - 1])[0]
            text = replaced(text, body, body + 1, f"{{ emulator::check_launch_bounds({most});")
    return text


def shared_memory(text: str) -> str:
    code = code_of(text)
    for found in reversed(list(re.finditer(r"(extern\s+)?__shared__\b", code))):
        end = found.end()
        while code[end] != ";":
            end = after_bracket(code, end) if code[end] in CLOSING else end + 1
        declaration = re.sub(r"__align__\s*\([^)]*\)", "", text[found.end():end]).strip()
        if found[1]:
            parts = re.fullmatch(r"(.*?)(\w+)\s*\[\s*\]", declaration, re.S) or give_up(f"extern __shared__ {declaration}")
            by = f"{parts[1]} *{parts[2]} = ({parts[1]} *)emulator::dynamic_shared_memory()"
        else:
            first, *others = split_list(declaration)
            parts = re.fullmatch(r"(.*?)" + DECLARATOR, first, re.S) or give_up(f"__shared__ {declaration}")
            element, statements = parts[1].strip(), []
            if element.startswith("struct {"):
                statements.append(f"typedef {element} {parts[2]}_shared")
                element = f"{parts[2]}_shared"
            for declarator in [parts[2] + parts[3]] + others:
                name, extents = (re.fullmatch(DECLARATOR, declarator) or give_up(f"__shared__ {declarator}")).groups()
                statements += [f"static emulator::shared_variable {name}_variable", f"auto &{name} = {name}_variable.of_block<{element} {extents}>()"]
            by = "; ".join(statements)
        text = replaced(text, found.start(), end, by)
    return text


def begin_of_kernel(code: str, end: int) -> int:
    """Where the expression before <<< begins: a name, with template arguments or without."""
    while code[end - 1].isspace():
        end -= 1
    if code[end - 1] == ">":
        depth = 0
        while True:
            end -= 1
            depth += (code[end] == ">") - (code[end] == "<")
            if depth == 0:
                break
    while code[end - 1].isalnum() or code[end - 1] in "_:":
        end -= 1
    return end


def launches(text: str) -> str:
    code = code_of(text)
    templates = {found[1] for found in TEMPLATE_KERNEL.finditer(code)}
    for found in reversed(list(re.finditer("<<<", code))):
        begin, configured = begin_of_kernel(code, found.start()), code.index(">>>", found.end())
        arguments = code.index("(", configured)
        if code[configured + 3:arguments].strip():
            give_up("a launch without arguments")
        end = after_bracket(code, arguments)
        kernel, configuration = text[begin:found.start()].strip(), split_list(text[found.end():configured])
        if not 2 <= len(configuration) <= 4:
            give_up(f"the configuration of {kernel}'s launch")
        configuration += ["0"] * (4 - len(configuration))
        name = kernel.split("<")[0]
        address = "nullptr" if kernel in templates else f"(const void *)({kernel})"     # deduced template arguments: it has no address by this name
        text = replaced(text, begin, end, f'emulator::launch("{name}", {address}, {", ".join(configuration)}, [&] {{ {kernel}{text[arguments:end]}; }})')
    return text


def instructions(text: str) -> str:
    code = code_of(text)
    for found in reversed(list(re.finditer(r"\basm\s*(?:volatile\b)?\s*\(", code))):
        end = after_bracket(code, found.end() - 1)
        inside = text[found.end():end - 1]
        quoted = re.match(r'\s*((?:"[^"]*"\s*)+)', inside) or give_up(f"asm {inside}")
        assembly = "".join(re.findall(r'"([^"]*)"', quoted[1]))
        operands = [inside[o.end():after_bracket(inside, o.end() - 1) - 1] for o in re.finditer(r'"[^"]*"\s*\(', inside)]
        operands = [re.sub(r"^\(unsigned\)\s*(?=__cvta_generic_to_shared\b)", "", o) for o in operands]      # addresses have 64 bits here
        statement = re.fullmatch(r"\s*([\w.]+)\s*([^;]*);\s*", assembly) or give_up(f"asm of anything but one instruction: {assembly}")
        arguments = [operands[int(operand)] if operand else literal for operand, literal in re.findall(r"%(\d+)|\b(\d+)\b", statement[2])]
        text = replaced(text, found.start(), end, f'ptx_{re.sub(r"[^0-9A-Za-z]", "_", statement[1])}({", ".join(arguments)})')
    return text


def main() -> None:
    source, target = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        text = file.read()
    for rewrite in (check_launch_bounds, shared_memory, launches, instructions):
        text = rewrite(text)
    text = re.sub(r'#include "kernels/cuda/(\w+\.cuh)"', r'#include "\1"', text)        # the translated one, beside this
    with open(target, "w", encoding="utf-8") as file:
        file.write(f'#line 1 "{os.path.normpath(source)}"\n{text}')


main()

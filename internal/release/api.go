package main

import (
	"cmp"
	"errors"
	"fmt"
	"go/types"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
)

// systems are those whose exported names are recorded: the one with the most features, one
// of the BSDs, and one where package net makes the socket.
var systems = []string{"linux", "freebsd", "windows"}

// A face is what the packages of a module export: one line for each function, type, field,
// method, constant and variable, below a line for its package.
type face []string

// faceOf reads the face of the module in dir. A line that does not hold for all systems
// names those for which it does.
func faceOf(dir string) (face, error) {
	seen := make(map[string]map[string][]string) // systems by package and line
	for _, system := range systems {
		loaded, err := packages.Load(&packages.Config{
			Mode: packages.NeedName | packages.NeedTypes | packages.NeedImports,
			Dir:  dir,
			Env:  append(os.Environ(), "GOOS="+system, "CGO_ENABLED=0"),
		}, "./...")
		if err != nil {
			return nil, err
		}
		for _, p := range loaded {
			if len(p.Errors) > 0 {
				return nil, fmt.Errorf("%s on %s: %w", p.PkgPath, system, p.Errors[0])
			}
			if p.Name == "main" || slices.Contains(strings.Split(p.PkgPath, "/"), "internal") {
				continue
			}
			for _, line := range exported(p.Types) {
				if seen[p.PkgPath] == nil {
					seen[p.PkgPath] = make(map[string][]string)
				}
				seen[p.PkgPath][line] = append(seen[p.PkgPath][line], system)
			}
		}
	}
	var f face
	for _, pkg := range slices.Sorted(maps.Keys(seen)) {
		if f != nil {
			f = append(f, "")
		}
		f = append(f, "package "+pkg, "")
		for _, line := range slices.Sorted(maps.Keys(seen[pkg])) {
			if on := seen[pkg][line]; len(on) < len(systems) {
				line += " // " + strings.Join(on, ", ")
			}
			f = append(f, line)
		}
	}
	return f, nil
}

// exported returns the lines of a package.
func exported(pkg *types.Package) (lines []string) {
	text := func(t types.Type) string {
		return types.TypeString(unnamed(t), func(other *types.Package) string {
			if other == pkg {
				return ""
			}
			return other.Name()
		})
	}
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	scope := pkg.Scope()
	for _, name := range scope.Names() {
		object := scope.Lookup(name)
		if !object.Exported() {
			continue
		}
		switch object := object.(type) {
		case *types.Const:
			add("const %s %s = %s", name, text(object.Type()), object.Val())
		case *types.Var:
			add("var %s %s", name, text(object.Type()))
		case *types.Func:
			add("func %s%s", name, strings.TrimPrefix(text(object.Type()), "func"))
		case *types.TypeName:
			if object.IsAlias() {
				add("type %s = %s", name, text(types.Unalias(object.Type())))
				continue
			}
			switch under := object.Type().Underlying().(type) {
			case *types.Struct:
				add("type %s struct", name)
				for field := range under.Fields() {
					if field.Embedded() && field.Exported() {
						add("field %s.%s %s (embedded)", name, field.Name(), text(field.Type()))
					} else if field.Exported() {
						add("field %s.%s %s", name, field.Name(), text(field.Type()))
					}
				}
			case *types.Interface:
				add("type %s interface", name)
			default:
				add("type %s %s", name, text(under))
			}
			values := types.NewMethodSet(object.Type())
			all := values
			if !types.IsInterface(object.Type()) {
				all = types.NewMethodSet(types.NewPointer(object.Type()))
			}
			for selection := range all.Methods() {
				m := selection.Obj()
				receiver := "*" + name
				if values.Lookup(pkg, m.Name()) != nil {
					receiver = name
				}
				switch {
				case m.Exported():
					add("method (%s) %s%s", receiver, m.Name(), strings.TrimPrefix(text(m.Type()), "func"))
				case types.IsInterface(object.Type()):
					add("method (%s) %s, unexported", receiver, m.Name())
				}
			}
		}
	}
	return lines
}

// unnamed returns t without the names of the parameters and results, which callers do not
// depend on.
func unnamed(t types.Type) types.Type {
	s, ok := t.(*types.Signature)
	if !ok {
		return t
	}
	tuple := func(vars *types.Tuple) *types.Tuple {
		var all []*types.Var
		for v := range vars.Variables() {
			all = append(all, types.NewParam(v.Pos(), v.Pkg(), "", unnamed(v.Type())))
		}
		return types.NewTuple(all...)
	}
	return types.NewSignatureType(nil, nil, nil, tuple(s.Params()), tuple(s.Results()), s.Variadic())
}

func (f face) String() string { return strings.Join(f, "\n") + "\n" }

func recordOf(dir string, m folder) string {
	return filepath.Join(dir, "internal", "release", "api", m.name()+".txt")
}

func releasedOf(dir string, m folder) string {
	return filepath.Join(dir, "internal", "release", "api", "released", m.name()+".txt")
}

// readFace reads a record. Before the first release there is no record of the last one.
func readFace(name string) (face, error) {
	text, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n"), err
}

// writeFaces records the face of each published module.
func writeFaces(dir string) error {
	for _, m := range published {
		f, err := faceOf(filepath.Join(dir, string(m)))
		if err == nil {
			err = writeFile(recordOf(dir, m), []byte(f.String()), 0o666)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// releaseFaces makes the records those of the last release.
func releaseFaces(dir string) error {
	for _, m := range published {
		text, err := os.ReadFile(recordOf(dir, m))
		if err == nil {
			err = writeFile(releasedOf(dir, m), text, 0o666)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkFaces returns an error if a published module does not export what its record says, or
// if the changelog does not name what has changed since the last release.
func checkFaces(dir string) error {
	var problems []error
	log, err := readChangelog(dir)
	if err != nil {
		return err
	}
	for _, m := range published {
		current, err := faceOf(filepath.Join(dir, string(m)))
		if err != nil {
			return err
		}
		recorded, err := readFace(recordOf(dir, m))
		if err != nil {
			return err
		}
		if diff := difference(recorded, current); len(diff) > 0 {
			problems = append(problems, fmt.Errorf("%s exports something else than internal/release/api/%s.txt says; if that is intended, run .ci/api -w:\n%s",
				m.path(), m.name(), strings.Join(diff, "\n")))
		}
		last, err := readFace(releasedOf(dir, m))
		if err != nil {
			return err
		}
		problems = append(problems, unmentioned(last, current, log.names())...)
	}
	return errors.Join(problems...)
}

// difference returns the lines that only one of two faces has, with their packages.
func difference(old, current face) (diff []string) {
	a, b := old.lines(), current.lines()
	for _, line := range slices.SortedFunc(maps.Keys(merge(a, b)), line.compare) {
		switch {
		case !a[line]:
			diff = append(diff, "+ "+line.pkg+": "+line.text)
		case !b[line]:
			diff = append(diff, "- "+line.pkg+": "+line.text)
		}
	}
	return diff
}

// A line is one exported thing of a package.
type line struct{ pkg, text string }

func (l line) compare(other line) int {
	return cmp.Or(cmp.Compare(l.pkg, other.pkg), cmp.Compare(l.text, other.text))
}

func (f face) lines() map[line]bool {
	all, pkg := make(map[line]bool), ""
	for _, text := range f {
		if p, found := strings.CutPrefix(text, "package "); found {
			pkg = p
		} else if text != "" {
			all[line{pkg, text}] = true
		}
	}
	return all
}

func merge(a, b map[line]bool) map[line]bool {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

// subject matches what a line is about: a name of the package, or a type and its member.
var subject = regexp.MustCompile(`^(?:(?:const|var|func|type) (\w+)|field (\w+)\.(\w+)|method \(\*?(\w+)\) (\w+))`)

func (l line) subject() (name, member string) {
	m := subject.FindStringSubmatch(l.text)
	if m == nil {
		return l.text, ""
	}
	return cmp.Or(m[1], m[2], m[4]), cmp.Or(m[3], m[5])
}

// unmentioned returns an error for each change that the changelog does not name. A new or
// removed type stands for its members.
func unmentioned(last, current face, named map[string]bool) (problems []error) {
	a, b := last.lines(), current.lines()
	has := func(lines map[line]bool, pkg, name string) bool {
		for l := range lines {
			if n, member := l.subject(); l.pkg == pkg && n == name && member == "" {
				return true
			}
		}
		return false
	}
	told := make(map[string]bool)
	for _, l := range slices.SortedFunc(maps.Keys(merge(a, b)), line.compare) {
		if a[l] && b[l] {
			continue
		}
		name, member := l.subject()
		if member != "" && has(a, l.pkg, name) != has(b, l.pkg, name) {
			continue
		}
		full := name
		if member != "" {
			full += "." + member
		}
		if key := l.pkg + "." + full; !named[cmp.Or(member, name)] && !told[key] {
			told[key] = true
			problems = append(problems, fmt.Errorf("%s: %s has changed, and CHANGELOG.md does not name it under Unreleased", l.pkg, full))
		}
	}
	return problems
}
